"""What ``task_networks.py`` runs, each function on ranks of its own by ``small_runs.call``."""

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from family_checks import started
from small_configs import small_config
from small_runs import batches, run_losses
from small_tasks import settings_of, write_samples

from bigtrain.checkpoint.loader import load_checkpoint
from bigtrain.cli.hydra_cli import read_run
from bigtrain.config import Head, Precision, TrainConfig
from bigtrain.config.tasks import head_of
from bigtrain.engine.state import MODEL, whole_entry
from bigtrain.models.hf.build import HFCausalLM
from bigtrain.models.hf.heads import HEADS, HFNetwork
from bigtrain.run.directory import find_whole
from bigtrain.run.export import export
from bigtrain.tasks import build_objective

STEPS, STOPPED = 3, 2
_CONVOLUTIONS = {"conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_conv_pos_embeddings": 16}
_CONVOLUTIONS |= {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "pad_token_id": 0}
_CONVOLUTIONS |= {"feat_extract_norm": "layer", "do_stable_layer_norm": True}  # as those of 300 million parameters
_IMAGES = {"image_size": 8, "patch_size": 2, "num_channels": 3}
NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("encoder", "masked_lm", {}),
    "roberta": ("encoder", "masked_lm", {}),
    "distilbert": ("encoder", "masked_lm", {"dim": 32, "hidden_dim": 48}),
    "albert": ("encoder", "masked_lm", {"embedding_size": 16, "num_hidden_groups": 1}),
    "modernbert": ("encoder", "masked_lm", {"cls_token_id": 1, "sep_token_id": 2}),
    "electra": ("encoder", "texts", {"embedding_size": 32}),
    "deberta-v2": ("encoder", "tags", {}),
    "t5": ("encoder-decoder", "pairs", {"d_kv": 8, "d_ff": 48, "decoder_start_token_id": 0}),
    "bart": ("encoder-decoder", "pairs", {"decoder_start_token_id": 2}),
    "marian": ("encoder-decoder", "pairs", {"decoder_start_token_id": 2}),
    "pegasus": ("encoder-decoder", "pairs", {"decoder_start_token_id": 0}),
    "vit": ("vision", "images", _IMAGES),
    "beit": ("vision", "images", _IMAGES),
    "dinov2": ("vision", "images", _IMAGES),
    "convnext": ("vision", "images", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}),
    "swin": (
        "vision",
        "images",
        {**_IMAGES, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    ),
    "wav2vec2": ("speech", "ctc", {**_CONVOLUTIONS, "vocab_size": 32}),
    "hubert": ("speech", "audio", _CONVOLUTIONS),
    "whisper": (
        "speech",
        "speech",
        {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 16, "decoder_start_token_id": 1},
    ),
    "gpt2": ("decoder", "causal_lm", {}),
    "llama": ("decoder", "causal_lm", {}),
    "qwen3": ("decoder", "texts", {}),
}
"""Kind of network, kind of its samples (``small_tasks.py``), and settings besides the small ones, by ``model_type``."""


def prepare(architecture: str, directory: Path) -> None:
    """Write samples and ``network/config.json``."""
    write_samples(directory)
    kind, _, changes = NETWORKS[architecture]
    if kind != "decoder" and hasattr(transformers.CONFIG_MAPPING[architecture](), "is_decoder"):
        changes = {"is_decoder": False, **changes}
    small_config(architecture, **changes).save_pretrained(directory / "network")


def configuration(architecture: str, directory: Path, engine: str, name: str, *args: str) -> TrainConfig:
    """Return the run, of a network from scratch, for the ranks that the environment says."""
    _, samples, _ = NETWORKS[architecture]
    run = [f"engine={engine}", "engine.precision=fp32", f"train.steps={STEPS}", "train.global_batch_size=7"]
    run += ["engine.deepspeed.persistence_threshold_elements=0", "optimizer.lr=1e-3", "optimizer.eps=1e-6"]
    run += ["scheduler=constant", "scheduler.warmup_steps=0", "checkpoint.asynchronous=false"]
    model = ["+model=hf", f"model.name={directory}/network"]
    place = [f"run.root={directory}/runs", f"run.name={name}"]
    return read_run([*model, *settings_of(samples, directory), *run, *place, *args])


def train(architecture: str, directory: Path, engine: str, name: str, *args: str) -> list[float]:
    """Train from the newest checkpoint on, if there is one; return the losses of all steps."""
    return run_losses(configuration(architecture, directory, engine, name, *args))


def compare_export(architecture: str, directory: Path, name: str) -> float:
    """Export a run; return by how much the outputs of what transformers opens differ from those of its checkpoint."""
    config = configuration(architecture, directory, "ddp", name, "train.micro_batch_size=7")
    run, out, head = config.run.directory, directory / "exported", head_of(config.task)
    export(run, out, precision=Precision.fp32, max_shard_bytes=10**9)
    theirs, left = getattr(transformers, HEADS[head].auto).from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    if any(left.values()):
        raise AssertionError(f"transformers opens the export with {left}")
    ours = started(config.model, seed=0)
    load_checkpoint(find_whole(run)[1], {MODEL + key: whole_entry(p) for key, p in ours.named_parameters()})
    wrapped = HFCausalLM(theirs) if head in (Head.causal_lm, Head.masked_lm) else HFNetwork(theirs, head)
    objective, batch = build_objective(config.task), next(iter(batches(config)))
    inputs = [batch[key] for key, field in objective.fields.items() if field.ignored is None and key in batch]
    with torch.no_grad():
        found, expected = (_logits(network.eval()(*inputs)) for network in (wrapped, ours))
    difference = (found - expected).abs().max() / expected.abs().max().clamp(min=1.0)
    return math.inf if difference.isnan() else difference.item()


def _logits(outputs: Any) -> torch.Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs
