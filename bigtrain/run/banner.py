"""What a launch says before its first step: what is trained, on what, for how long, in how much memory."""

import math
import textwrap
from collections.abc import Iterator

from bigtrain.config import ModelKind, TrainConfig
from bigtrain.config.parallel import shared
from bigtrain.data.read.corpus import FileSplit
from bigtrain.data.read.stream import SampleStream, StoredSamples
from bigtrain.engine.state import MODEL
from bigtrain.models.sizes import is_language_model, model_sizes, visited_weights
from bigtrain.plan import Report
from bigtrain.run.data import sets_of
from bigtrain.run.frozen import parameters_of
from bigtrain.run.trainer import Run
from bigtrain.telemetry.peak import Peak
from bigtrain.telemetry.text import format_bytes, format_count

WIDTH, LABEL = 80, 12
FEW_DOCUMENTS, SMALL_SHARE = 20, 0.001


def banner(run: Run, report: Report, peak: Peak | None) -> list[str]:
    """Return lines of at most 80 columns: a label each, and what there is to say of it."""
    facts = {
        "run": f"{run.launch.directory}, {_beginning(run)}",
        "model": _model(run),
        "data": _data(run.streams["train"], run.config),
        "validation": _validation(run),
        "machine": _machine(run, peak),
        "step": _step(run),
        "length": _length(run),
        "memory": _memory(report),
        "watchdog": _watchdog(run.config),
    }
    lines = []
    for label, text in facts.items():
        lines += textwrap.wrap(
            text,
            WIDTH,
            initial_indent=f"{label:<{LABEL}}",
            subsequent_indent=" " * LABEL,
            break_long_words=False,
        )
    return lines


def _beginning(run: Run) -> str:
    return f"after step {run.start.step:,}" if run.start.step else "from the beginning"


def _model(run: Run) -> str:
    entries, config, model = run.engine.state.entries, run.config, run.config.model
    counts = {name: math.prod(entries[MODEL + name].shape) for name in parameters_of(entries)}
    frozen = sum(counts[name] for name in run.frozen.names if name in counts) if run.frozen else 0
    told = f"{model.name or model.architecture}: {format_count(sum(counts.values()))} parameters"
    if model.kind is ModelKind.native and model.moe:
        unvisited = model_sizes(model).num_layers * model_sizes(model).matrices - visited_weights(model)
        told += f", {format_count(sum(counts.values()) - unvisited)} of them for a token"
    told += f", {format_count(frozen)} of them frozen" if frozen else ""
    return f"{told}; task {config.task.kind}, {config.optimizer.kind.name}"


def _data(stream: SampleStream, config: TrainConfig) -> str:
    parts = ", ".join(stream.components) if config.data.mixture else config.data.source.name
    length = f" of {stream.sequence_length:,} tokens" if stream.sequence_length else ""
    if stream.is_live:
        return f"{parts}, tokenised on the fly into samples{length}"
    tokens = f" ({format_count(stream.num_samples * stream.sequence_length)} tokens)" if length else ""
    return f"{parts}: {stream.num_samples:,} samples{length}{tokens}"


def _validation(run: Run) -> str:
    settings, sets = run.config.validation, sets_of(run.streams, "validation")
    if not settings.every_steps or not sets:
        return "none: validation.every_steps=0"
    told = ", ".join(f"{name}{' ' * bool(name)}{stream.num_samples:,} samples" for name, stream in sets.items())
    return "; ".join([f"every {settings.every_steps:,} steps: {told}", *_too_small(run.streams["train"], sets)])


def _too_small(train: SampleStream, sets: dict[str, SampleStream]) -> Iterator[str]:
    """Yield why the loss of a set says little."""
    for stream in sets.values():
        splits = [component.split for component in stream.components.values() if isinstance(component, StoredSamples)]
        documents = [int(split.shard_documents.sum()) for split in splits if isinstance(split, FileSplit)]
        if documents and sum(documents) < FEW_DOCUMENTS:
            yield f"only {sum(documents)} document{'s' * (sum(documents) != 1)}: a noisy loss"
        elif not train.is_live and stream.num_samples < SMALL_SHARE * train.num_samples:
            yield f"less than {SMALL_SHARE:.1%} of the training data: a noisy loss"


def _machine(run: Run, peak: Peak | None) -> str:
    engine, config = run.engine, run.config
    layout = "".join(f", {setting}" for setting in shared(config.parallel))
    ranks = f"{engine.mesh.size} {'rank' if engine.mesh.size == 1 else 'ranks'}"
    told = f"{ranks} on {engine.device.type}, {config.engine.precision.name}; engine {config.engine.kind.name}{layout}"
    return f"{told}; peak {peak.flops_per_second / 1e12:.2g} TFLOP/s ({peak.source.split(':')[0]})" if peak else told


def _step(run: Run) -> str:
    train, ranks = run.config.train, run.engine.mesh.dp_size
    unit, size = run.unit
    number = train.micro_batches(ranks)
    told = f"{train.global_batch_size:,} samples = {train.micro_batch_size} x {number} micro-batches x {ranks} ranks"
    padding = train.micro_batch_size * number * ranks - train.global_batch_size
    told += f" - {padding} of padding" if padding else ""
    return f"{told}; {train.global_batch_size * size:,} {unit}" if size > 1 else told


def _length(run: Run) -> str:
    config, stream, (unit, size) = run.config, run.streams["train"], run.unit
    samples = config.train.steps * config.train.global_batch_size
    told = f"{config.train.steps:,} steps, {format_count(samples * size)} {unit}"
    return told if stream.is_live else f"{told}, {samples / max(stream.num_samples, 1):.3g} epochs"


def _memory(report: Report) -> str:
    needed, _ = report.needed_bytes(report.estimate)
    told = f"{format_bytes(needed)} of {format_bytes(report.machine.available_bytes)} a rank by estimate"
    model = report.config.model
    is_counted = model.kind is not ModelKind.own and is_language_model(model)
    return told if is_counted else f"{told}, without activations"


def _watchdog(config: TrainConfig) -> str:
    seconds = config.supervision.hang_seconds
    if seconds == 0:
        return "off: supervision.hang_seconds=0"
    return f"{seconds:g} s in a phase, and 3 times its longest before, are a hang"
