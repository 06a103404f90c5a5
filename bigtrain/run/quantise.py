"""An export in fewer bits, by torchao, as transformers opens it; and the loss on held-out text that it has."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn import functional as F

from bigtrain.config import Quantisation
from bigtrain.config.packages import require
from bigtrain.data.read.batch import Batch
from bigtrain.data.read.loader import validation_batches
from bigtrain.errors import BigtrainError, ConfigError
from bigtrain.log import get_logger, quiet_torchao
from bigtrain.run.data import HELD_OUT
from bigtrain.run.evaluation import open_sets, opened
from bigtrain.tasks import build_objective
from bigtrain.tasks.base import IGNORE_INDEX

GROUP_SIZE = 128  # weights that share a scale in int4, as torchao's default


def require_quantisation(kind: Quantisation) -> None:
    """Raise a ConfigError if this machine cannot quantise so."""
    require(f"quantise={kind.name}", "torchao", "fp8")
    if kind is Quantisation.int4 and not find_spec("mslk"):
        raise ConfigError("quantise=int4 needs the package mslk, which is for GPUs: pip install mslk; int8 needs none")


def quantise(checkpoint: Path, directory: Path, kind: Quantisation, max_shard_bytes: int) -> list[float]:
    """Quantise a checkpoint's export in place; return its loss on held-out text before and after, if the run has any."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        batches = list(_held_out(checkpoint))
    except BigtrainError as error:
        get_logger().warning(f"quantise: the loss is not measured: {error}")
        batches = []
    before = [_loss(directory, batches)] if batches else []
    _write(directory, kind, max_shard_bytes)
    return [*before, _loss(directory, batches)] if batches else []


def _write(directory: Path, kind: Quantisation, max_shard_bytes: int) -> None:
    """Replace the weights of an export by those of all linear layers but the head in fewer bits, in place.

    One scale per output channel of int8 and fp8, per group of :data:`GROUP_SIZE` of int4; activations stay as they are.
    ``config.json`` says so to transformers, and is otherwise left as it is.
    """
    quiet_torchao()
    from torchao import quantization
    from torchao.utils import TorchAOBaseTensor
    from transformers import AutoModelForCausalLM, TorchAoConfig

    settings: dict[Quantisation, Any] = {
        Quantisation.int8: quantization.Int8WeightOnlyConfig,
        Quantisation.fp8: quantization.Float8WeightOnlyConfig,
        Quantisation.int4: lambda: quantization.Int4WeightOnlyConfig(group_size=GROUP_SIZE),
    }
    chosen = TorchAoConfig(settings[kind]())
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=chosen, dtype="auto")
    if not any(isinstance(parameter.data, TorchAOBaseTensor) for parameter in model.parameters()):
        name = type(model).__name__
        raise ConfigError(
            f"quantise={kind.name}: torchao knows nn.Linear, and {name} has none but its head; leave it out"
        )
    with TemporaryDirectory(dir=directory.parent) as place:
        model.save_pretrained(place, max_shard_size=max_shard_bytes)
        for old in directory.glob("model*.safetensors*"):
            old.unlink()
        for new in Path(place).glob("model*.safetensors*"):
            new.rename(directory / new.name)
        written = json.loads(Path(place, "config.json").read_text(encoding="utf-8"))["quantization_config"]
    config = directory / "config.json"
    described = json.loads(config.read_text(encoding="utf-8")) | {"quantization_config": written}
    config.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _loss(directory: Path, batches: list[Batch]) -> float:
    """Return the mean loss per target, in nats, of a model opened by transformers.

    Documents that share a row see one another, as they would elsewhere.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    total, num_targets = 0.0, 0
    for batch in batches:
        with torch.no_grad():
            logits = model(input_ids=batch["tokens"]).logits.float()
        targets = batch["targets"].flatten()
        total += float(F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORE_INDEX, reduction="sum"))
        num_targets += int((targets != IGNORE_INDEX).sum())
    return total / num_targets


def _held_out(run: Path) -> Iterator[Batch]:
    """Yield what the validations of a run take."""
    with opened(run) as (config, directory):
        for stream in open_sets(config, directory, HELD_OUT, None).values():
            steps = validation_batches(
                stream,
                batches=config.validation.batches,
                global_batch_size=config.train.global_batch_size,
                micro_batch_size=config.train.micro_batch_size,
                dp_rank=0,
                dp_size=1,
                objective=build_objective(config.task),
            )
            yield from (batch for micro_batches in steps for batch in micro_batches)
