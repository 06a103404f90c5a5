"""What ``families.py`` compares, a function a check, each called on ranks of its own by ``small_runs.call``.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
import transformers
from small_runs import batches, run_config, run_losses, write_models
from torch import nn
from transformers import AutoModelForCausalLM

from bigtrain.checkpoint.loader import load_checkpoint
from bigtrain.config import DataConfig, DataSource, EngineKind, ModelConfig, Precision, TrainConfig, TrainingConfig
from bigtrain.engine.state import MODEL, whole_entry
from bigtrain.engine.wrap import materialise
from bigtrain.models import build_initial_values, build_model
from bigtrain.run.directory import find_whole
from bigtrain.run.export import export

STEPS, WORLD_SIZE, BATCH, TOKENS = 3, 2, 4, 16


def prepare(family: str, changes: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Write the models of a family, and make sure that transformers computes one; return what it is."""
    model = write_models(family, changes, directory)
    vocab_size = model.config.get_text_config().vocab_size
    model.train()(input_ids=torch.randint(vocab_size, (BATCH, TOKENS)), use_cache=False)
    with contextlib.suppress(ValueError):  # some write a configuration of which AutoModelForCausalLM knows nothing
        again = AutoModelForCausalLM.from_pretrained(directory / "pretrained", dtype=torch.float32)
        others = [name for name, p in again.named_parameters() if not torch.equal(p, model.get_parameter(name))]
        assert not others, f"transformers itself loads other values than it has saved: {', '.join(others)}"
    return {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}


def compare_start(directory: Path, start: str) -> dict[str, Any]:
    """Return by how much our logits differ from transformers' before the first step, and the losses of its loop."""
    config = configuration(directory, start, EngineKind.ddp, world_size=1)
    ours = started(config.model, config.train.seed)
    weights = {name.removeprefix("causal_lm."): p.detach().clone() for name, p in ours.named_parameters()}
    if start == "pretrained":
        theirs = AutoModelForCausalLM.from_pretrained(directory / start, dtype=torch.float32)
    else:
        theirs = AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory / start))
        left = theirs.load_state_dict(weights, strict=False)
        assert not left.unexpected_keys and weights.keys() == {name for name, _ in theirs.named_parameters()}
    return {"logits": logits_difference(ours, theirs), "losses": train_by_hand(theirs, config)}


def train_by_hand(model: nn.Module, config: TrainConfig) -> list[float]:
    """Train transformers' own model on the batches of the run; return the losses."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    groups = [
        {"params": matrices, "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps)
    losses = []
    model.train()
    for batch in batches(config):
        logits_BTV = model(input_ids=batch["tokens"], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch["targets"].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train(directory: Path, start: str, engine: EngineKind) -> list[float]:
    """Return the losses of a run."""
    return run_losses(configuration(directory, start, engine, world_size=WORLD_SIZE))


def compare_export(directory: Path, run: Path) -> dict[str, Any]:
    """Export a run; return by how much the logits of what transformers opens differ from those of its checkpoint."""
    out = run.with_name(f"{run.name}-export")
    export(run, out, precision=Precision.fp32, max_shard_bytes=10**9)
    theirs, left = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    if any(left.values()):
        raise AssertionError(f"transformers opens the export with {left}")
    ours = started(configuration(directory, run.name.partition("-")[0], EngineKind.ddp, world_size=1).model, seed=0)
    load_checkpoint(find_whole(run)[1], {MODEL + name: whole_entry(p) for name, p in ours.named_parameters()})
    return {"logits": logits_difference(ours, theirs)}


def configuration(directory: Path, start: str, engine: EngineKind, *, world_size: int) -> TrainConfig:
    """Return the checked configuration of a run.

    Raises:
        ConfigError: listing every problem.
    """
    data = DataConfig(source=DataSource.synthetic, sequence_length=TOKENS)
    train = TrainingConfig(steps=STEPS, global_batch_size=BATCH)
    return run_config(directory, start, engine, data, train, world_size=world_size)


def started(config: ModelConfig, seed: int) -> nn.Module:
    """Return our model with the weights that a run begins with."""
    with torch.device("meta"):
        model = build_model(config)
    materialise(model, torch.device("cpu"))
    values = build_initial_values(config, seed)
    for name, parameter in model.named_parameters():
        flat = torch.empty(parameter.numel())
        values[name].fill(0, flat)
        parameter.data.copy_(flat.view(parameter.shape))
    return model


@torch.no_grad()
def logits_difference(ours: nn.Module, theirs: nn.Module) -> float:
    """Return the largest difference of logits on random tokens, relative to the largest logit if that is above 1."""
    tokens_BT = torch.randint(ours.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    expected_BTV = theirs.eval()(input_ids=tokens_BT, use_cache=False).logits
    difference = (ours.eval()(tokens_BT) - expected_BTV).abs().max() / expected_BTV.abs().max().clamp(min=1.0)
    return math.inf if difference.isnan() else difference.item()
