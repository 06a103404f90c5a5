"""Why a classifier says what it says of a sample: how much each token or pixel adds to the odds of the label.

Shape suffixes: B samples, U units, which are tokens or pixels, C labels.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bigtrain.config import EngineKind, Inputs, TaskKind, TrainConfig
from bigtrain.data.read.batch import Batch, build_batch
from bigtrain.data.read.tokenizer import TOKENIZER_FILE, load_tokenizer, mask_token_id, special_ids
from bigtrain.engine.base import Engine
from bigtrain.errors import ConfigError
from bigtrain.processes import RankInfo
from bigtrain.run.data import HELD_OUT, elsewhere, held_out_batches
from bigtrain.run.directory import label_names
from bigtrain.run.evaluation import load_engine, open_sets, opened
from bigtrain.run.inputs import open_inputs
from bigtrain.tasks.base import IGNORE_INDEX

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Of the units of a sample that are deleted, to see what that costs."""
RANDOM = "random"
_FEW = 8  # samples that are shown if nobody says which
_ROWS_AT_ONCE = 256  # of samples with something left out


@dataclass(frozen=True, slots=True)
class Classifier:
    """A trained classifier of text or images, whole in this process."""

    network: nn.Module
    inputs: Inputs
    baseline: float  # what stands for a unit that is left out: a token, or the mean of all images
    special: tuple[int, ...] = ()  # tokens that are no text

    def units(self, batch: Batch) -> Tensor:
        """Return which units a sample has, bool ``(B, U)``: tokens of its text, or pixels, whatever their channels."""
        if self.inputs is Inputs.pixels:
            return torch.ones_like(batch["pixels"][:, 0], dtype=torch.bool).flatten(1)
        tokens_BU = batch["tokens"]
        is_text_BU = torch.arange(tokens_BU.shape[1]) < batch["lengths"][:, None]
        return is_text_BU & ~torch.isin(tokens_BU, torch.tensor(self.special))

    def logits(self, batch: Batch) -> Tensor:
        columns = [batch["pixels"]] if self.inputs is Inputs.pixels else [batch["tokens"], batch["lengths"]]
        return self.network(*columns).float()

    def without(self, batch: Batch, gone_BU: Tensor) -> Batch:
        """Return samples of which some units are left out."""
        name = self.inputs.name
        gone = gone_BU.view(len(gone_BU), 1, *batch[name].shape[2:]) if self.inputs is Inputs.pixels else gone_BU
        return Batch({**batch, name: torch.where(gone, torch.tensor(self.baseline).to(batch[name].dtype), batch[name])})


def log_odds(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Return the log-odds of a label against all others, ``(B,)``: unlike its probability it has no end at 1."""
    of_label_B1 = logits_BC.gather(1, labels_B[:, None])
    others_BC = logits_BC.scatter(1, labels_B[:, None], -math.inf)
    return of_label_B1[:, 0] - others_BC.logsumexp(dim=1)


def gradient_times_input(model: Classifier, batch: Batch, labels_B: Tensor) -> Tensor:
    """Return the gradient of the log-odds by each unit times the unit, ``(B, U)`` (Shrikumar et al., 2016)."""
    if model.inputs is Inputs.pixels:
        pixels = batch["pixels"].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(log_odds(model.logits(Batch(pixels=pixels)), labels_B).sum(), pixels)
        return (gradient * pixels).detach().sum(dim=1).flatten(1)
    embedded: list[Tensor] = []

    def keep(_: nn.Module, __: Any, states: Tensor) -> Tensor:
        embedded.append(states.detach().requires_grad_())
        return embedded[0]

    with _embedding(model.network).register_forward_hook(keep):
        loss = log_odds(model.logits(batch), labels_B).sum()
    (gradient,) = torch.autograd.grad(loss, embedded[0])
    return (gradient * embedded[0]).detach().sum(dim=-1)


@torch.no_grad()
def occlusion(model: Classifier, batch: Batch, labels_B: Tensor) -> Tensor:
    """Return by how much the log-odds fall without each unit, ``(B, U)`` (Zeiler and Fergus, 2014)."""
    whole_B, units_BU = log_odds(model.logits(batch), labels_B), model.units(batch)
    fallen_BU = torch.zeros_like(units_BU, dtype=torch.float32)
    pairs = units_BU.nonzero()
    for rows, places in (part.unbind(1) for part in pairs.split(_ROWS_AT_ONCE)):
        gone = torch.zeros(len(rows), units_BU.shape[1], dtype=torch.bool).scatter(1, places[:, None], True)
        left = model.without(Batch({name: tensor[rows] for name, tensor in batch.items()}), gone)
        fallen_BU[rows, places] = whole_B[rows] - log_odds(model.logits(left), labels_B[rows])
    return fallen_BU


@torch.no_grad()
def attention(model: Classifier, batch: Batch, labels_B: Tensor) -> Tensor:
    """Return how much attention each token gets in the last layer, the mean over heads and tokens that look, ``(B, U)``."""
    network: Any = model.network
    network.causal_lm.set_attn_implementation("eager")  # the others return none
    is_text_BU = torch.arange(batch["tokens"].shape[1]) < batch["lengths"][:, None]
    given = {"input_ids": batch["tokens"], "attention_mask": is_text_BU.long()}
    weights_BHUU = network.causal_lm(**given, output_attentions=True).attentions[-1]
    looks_BU = is_text_BU / batch["lengths"][:, None]
    return torch.einsum("bhqk,bq->bk", weights_BHUU.float(), looks_BU) / weights_BHUU.shape[1]


def _embedding(network: Any) -> nn.Module:
    return network.causal_lm.get_input_embeddings() if hasattr(network, "causal_lm") else network.embedding


METHODS: dict[str, Callable[[Classifier, Batch, Tensor], Tensor]] = {
    "gradient": gradient_times_input,
    "occlusion": occlusion,
    "attention": attention,
}


def deletion(model: Classifier, batch: Batch, importance_BU: Tensor) -> list[int]:
    """Return of how many samples the label is right when the most important units, ``SHARES`` of them, are left out."""
    units_BU = model.units(batch)
    order_BU = importance_BU.masked_fill(~units_BU, -math.inf).argsort(dim=1, descending=True, stable=True)
    rank_BU = order_BU.argsort(dim=1)
    right = []
    for share in SHARES:
        gone_BU = rank_BU < (share * units_BU.sum(dim=1, keepdim=True)).ceil()
        with torch.no_grad():
            predicted_B = model.logits(model.without(batch, gone_BU)).argmax(dim=1)
        right.append(int((predicted_B == batch["labels"]).sum()))
    return right


def explain(
    path: Path, *, inputs: Path | None, index: Sequence[int], methods: Sequence[str], samples: int
) -> dict[str, Any]:
    """Return, as plain data, what each unit adds in samples ``index`` of a file, or of those held out.

    Of ``samples`` that are held out it has the accuracy without the most important units, and without random ones; with
    0 none. ConfigError: the run is no classifier of text or images, or there are no such samples.
    """
    if RankInfo.from_env().world_size > 1:
        raise ConfigError("bigtrain explain runs in one process: start it without a launcher")
    with opened(path, batches=1) as (config, run):
        _require(config)
        engine, model = _load(path, config, run, methods)
        most = max([samples, *(row + 1 for row in index), 0 if index else _FEW]) if inputs is None else samples
        held_out = _held_out(config, run, engine, most) if most else Batch()
        source = held_out
        if inputs is not None:
            records = open_inputs(inputs, run, config)
            source = build_batch(records.read(*[np.arange(records.num_rows)] * 2))
        number = len(next(iter(source.values()), ()))
        index = list(index) or list(range(min(_FEW, number)))
        if wrong := [row for row in index if row >= number]:
            raise ConfigError(f"index={index}: there are {number} samples, counted from 0, and no {wrong[0]}")
        chosen = Batch({name: tensor[index] for name, tensor in source.items()})
        facts: dict[str, Any] = {
            "run": str(run),
            "labels": label_names(run),
            "samples": list(_described(model, chosen, index, methods, run)),
        }
        if samples:
            few = Batch({name: tensor[:samples] for name, tensor in held_out.items()})
            facts["deletion"] = {
                "shares": SHARES,
                "samples": len(few["labels"]),
                "right": _deleted(model, few, methods),
            }
        return facts


def _require(config: TrainConfig) -> None:
    is_known = config.task.kind == TaskKind.classification and not config.task.multi_label
    if not is_known or config.task.inputs not in (Inputs.tokens, Inputs.pixels):
        raise ConfigError(
            f"task={config.task.kind}: classifications of text and of images, with one label, are explained"
        )


def _load(path: Path, config: TrainConfig, run: Path, methods: Sequence[str]) -> tuple[Engine, Classifier]:
    # Not wrapped, in a world of one: gradients by inputs pass through no hook.
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, kind=EngineKind.ddp))
    engine, _ = load_engine(path, config)
    engine.module.eval()
    network: Any = engine.module.cpu().network
    if config.task.inputs is Inputs.pixels or not hasattr(network, "causal_lm"):
        if "attention" in methods:
            raise ConfigError("methods=[attention]: for encoders of text of transformers; leave it out")
        if config.task.inputs is Inputs.pixels:
            return engine, Classifier(network, Inputs.pixels, 0.0)
    tokenizer = load_tokenizer(run) if (run / TOKENIZER_FILE).is_file() else None
    mask = mask_token_id(tokenizer, run) if tokenizer else None
    special = special_ids(tokenizer) if tokenizer else []
    return engine, Classifier(network, Inputs.tokens, 0 if mask is None else mask, tuple(special))


def _held_out(config: TrainConfig, run: Path, engine: Engine, number: int) -> Batch:
    """Return the first held-out samples, at most so many."""
    with elsewhere(config.data):
        (stream, *_) = open_sets(config, run, HELD_OUT, None).values()
    batches = math.ceil(min(number, stream.num_samples) / config.train.global_batch_size)
    steps = held_out_batches(stream, config, engine, batches=batches)
    found = [{name: tensor.clone() for name, tensor in batch.items()} for step in steps for batch in step]
    whole = {name: torch.cat([batch[name] for batch in found]) for name in found[0]}
    is_padding = whole["labels"] == IGNORE_INDEX
    return Batch({name: tensor[~is_padding][:number] for name, tensor in whole.items()})


def _described(
    model: Classifier, batch: Batch, index: Sequence[int], methods: Sequence[str], run: Path
) -> Iterator[dict[str, Any]]:
    with torch.no_grad():
        probabilities_BC = model.logits(batch).softmax(dim=1)
    predicted_B = probabilities_BC.argmax(dim=1)
    found = {
        method: METHODS[method](model, batch, predicted_B).masked_fill(~model.units(batch), 0) for method in methods
    }
    tokenizer = load_tokenizer(run) if model.inputs is Inputs.tokens and (run / TOKENIZER_FILE).is_file() else None
    for place, row in enumerate(index):
        sample: dict[str, Any] = {"index": row, "predicted": int(predicted_B[place])}
        sample["probability"] = float(probabilities_BC[place, predicted_B[place]])
        if "labels" in batch:
            sample["label"] = int(batch["labels"][place])
        length = int(batch["lengths"][place]) if model.inputs is Inputs.tokens else None
        sample["importance"] = {method: values[place, :length].tolist() for method, values in found.items()}
        if model.inputs is Inputs.pixels:
            sample["pixels"] = batch["pixels"][place].tolist()
        else:
            ids = batch["tokens"][place, :length].tolist()
            sample["tokens"] = [
                tokenizer.decode([token], skip_special_tokens=False) if tokenizer else str(token) for token in ids
            ]
        yield sample


def _deleted(model: Classifier, batch: Batch, methods: Sequence[str]) -> dict[str, list[int]]:
    """Return of how many samples the label is right, by method and share; random units follow from the sample's place."""
    with torch.no_grad():
        predicted_B = model.logits(batch).argmax(dim=1)
    by_chance = torch.rand(model.units(batch).shape, generator=torch.Generator().manual_seed(0))
    scores = {method: METHODS[method](model, batch, predicted_B) for method in methods} | {RANDOM: by_chance}
    return {method: deletion(model, batch, values) for method, values in scores.items()}
