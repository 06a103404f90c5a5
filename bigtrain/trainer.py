"""A run from its configuration to its end; the loop is in :func:`train` and reads top to bottom."""

import contextlib
import dataclasses
import gc
import hashlib
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bigtrain import __version__, log
from bigtrain.checkpoint.loader import load_checkpoint
from bigtrain.checkpoint.saver import Saver, SaveReport
from bigtrain.checkpoint.store import RunState, find_checkpoints, read_run_state
from bigtrain.checks import check
from bigtrain.config import DataSource, Precision, Preflight, TrainConfig
from bigtrain.data import open_splits as open_data
from bigtrain.data.batch import IGNORE_INDEX
from bigtrain.data.index import read_index
from bigtrain.data.loader import StepBatch, TrainLoader, validation_batches
from bigtrain.data.prepare import prepare, prepared_directory
from bigtrain.distributed import (
    RankInfo,
    all_reduce_sum,
    broadcast_json,
    init_process_group,
    on_rank0,
    pick_device,
    shut_down,
)
from bigtrain.engine.base import Engine
from bigtrain.engine.build import build_engine
from bigtrain.engine.state import MODEL, initialise
from bigtrain.errors import EXIT_FINISHED, EXIT_RESUMABLE, CheckpointError, ConfigError, PreflightError
from bigtrain.models import build_initial_values, build_model
from bigtrain.optim.schedule import lr_at
from bigtrain.preflight import preflight
from bigtrain.redact import redact
from bigtrain.resilience.signals import StopAgreement, StopSignal
from bigtrain.run_files import find_resume, find_whole, keep_tokenizer, locate, read_config, run_directory, write_config
from bigtrain.schema import flatten, from_dict, to_dict
from bigtrain.telemetry import names
from bigtrain.telemetry.gauges import Gauges, perplexity
from bigtrain.telemetry.layer_norms import LayerNorms
from bigtrain.telemetry.meter import StepMeter
from bigtrain.telemetry.out_of_memory import explained
from bigtrain.telemetry.profiling import Profiler
from bigtrain.telemetry.recorder import NullRecorder, build_recorder

GC_EVERY_STEPS = 1000
"""Python's garbage collector runs on all ranks at the same step, instead of at a different one on each."""


@dataclass(slots=True)
class Run:
    """The parts of a run on this rank."""

    config: TrainConfig
    directory: Path
    engine: Engine
    splits: Mapping[str, Any]
    recorder: Any
    saver: Saver
    first_step: int
    """Completed optimizer steps at the start of this launch."""


def run(config: TrainConfig) -> int:
    """Train as ``config`` (resolved and checked) says, from the newest checkpoint on.

    Returns:
        ``EXIT_FINISHED`` or ``EXIT_RESUMABLE``.

    Raises:
        BigtrainError: the user can mend it.
    """
    info = RankInfo.from_env()
    log.setup(info.rank)
    device = pick_device(info)
    precision = config.engine.precision or (Precision.bf16 if device.type == "cuda" else Precision.fp32)
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=precision))
    check_memory(config, info, device)
    init_process_group(info, device)
    # Rank 0's configuration is the configuration of the run.
    config = from_dict(TrainConfig, broadcast_json(to_dict(config)))
    # Some launchers end all ranks as soon as one has ended: none goes before rank 0 has written everything.
    with explained(config, run_directory(config), info, device):
        code = broadcast_json(_run(config, info, device))
    # Only here: after a failure, a collective could wait for ever for ranks that are gone.
    shut_down()
    return code


def check_memory(config: TrainConfig, info: RankInfo, device: torch.device) -> None:
    """Estimate the memory of the run before anything is allocated.

    Raises:
        PreflightError: it does not fit and ``preflight`` is ``stop``.
    """
    report = preflight(
        config,
        world_size=info.world_size,
        local_world_size=info.local_world_size,
        device_type=device.type,
        precision=config.engine.precision,
    )
    if report.fits:
        return
    message = "\n".join([report.table(), *report.suggestions()])
    if config.preflight is Preflight.stop:
        raise PreflightError(f"{message}\npreflight=warn goes on regardless")
    log.get_logger().warning(message)


def _run(config: TrainConfig, info: RankInfo, device: torch.device) -> int:
    directory = run_directory(config)
    resume = find_resume(config)
    state = read_run_state(resume) if resume else None
    if state and state.step >= config.train.steps:
        log.get_logger().info(
            f"{directory} is finished at step {state.step}; a larger train.steps trains on, another run.name starts anew"
        )
        return EXIT_FINISHED
    splits = open_splits(config)
    if state:
        _check_continuation(state, config, splits["train"].fingerprint)
    on_rank0(lambda: write_run_files(config))
    engine = build_engine(config, lambda: build_model(config.model), info=info, device=device)
    if state:
        load_checkpoint(resume, engine.state.entries)
        engine.state.commit()
    else:
        values = build_initial_values(config.model, config.train.seed)
        initialise(engine.state, values, num_threads=_num_threads(info))
    first_step = state.step if state else 0
    saver = Saver(directory, engine.state.entries, config.checkpoint)
    recorder = open_recorder(config, first_step, engine)
    parts = Run(config, directory, engine, splits, recorder, saver, first_step)
    with recorder:
        recorder.event(
            "resume" if state else "start", step=first_step, world_size=info.world_size, checkpoint=str(resume or "")
        )
        return train(parts)


def train(run: Run) -> int:
    """Train until the run is finished or somebody wants it to stop; return the exit code.

    Raises:
        CheckpointError: saving has failed too often, or at the end.
    """
    config, engine, recorder, saver = run.config, run.engine, run.recorder, run.saver
    steps, last_launch_step = config.train.steps, _last_step_of_launch(run)
    meter = StepMeter(config.train.global_batch_size * config.data.sequence_length, device=engine.device)
    norms = LayerNorms(engine, config.optimizer, config.logging.layer_norms_every_steps)
    agreement, pending = StopAgreement(), []
    loader = train_loader(run.splits["train"], config, engine, first_step=run.first_step)
    gc.disable()
    with StopSignal() as signal, loader, _profiler(run) as profiler:
        for batch in loader:
            meter.data_ready(batch.micro_batches)
            step = batch.step + 1
            lr = lr_at(batch.step, peak_lr=config.optimizer.lr, num_steps=steps, config=config.scheduler)
            seed_step(config.train.seed, batch.step, engine.dp_rank, engine.device)
            loss, grad_norm = train_step(
                engine, batch, lr, before_update=partial(_before_update, step, meter, norms, saver)
            )
            meter.mark(names.OPTIMIZER_SECONDS)
            norms.after_update(step, lr)
            pending.append({"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, **meter.step_done(step)})

            record_save(run, saver.poll())
            if saver.num_failures >= config.checkpoint.max_failures:
                signal.request(f"checkpoint.max_failures={config.checkpoint.max_failures}")
            stopping = agreement.poll(signal.reason is not None) or step == last_launch_step
            finished = step == steps
            saving = stopping or finished or _is_due(step, config.checkpoint.every_steps)
            if saving or step % config.train.log_every_steps == 0:
                recorder.metrics(norms.merge(read_back(pending)), meter.phases())
            meter.mark(names.LOGGING_SECONDS)
            validation_loss = None
            if _is_due(step, config.validation.every_steps) or (finished and config.validation.every_steps):
                validation_loss = record_validation(run, step)
                meter.skip()
            if saving:
                save(run, step, validation_loss)
                meter.skip()
            if step % GC_EVERY_STEPS == 0:
                gc.collect()
            profiler.step_done(step)
            if finished or stopping:
                break
        agreement.settle()
        record_save(run, saver.finish())  # in here: a signal that a launcher repeats must not cut the last save short
    gc.enable()
    return _end(run, step, finished, signal.reason)


def train_step(
    engine: Engine, batch: StepBatch, lr: float, *, before_update: Callable[[], None] = lambda: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one optimizer step.

    The loss is the mean over the targets of the whole step on all ranks, never a mean of means.

    Args:
        engine: computes it.
        batch: this rank's part of the global batch.
        lr: learning rate.
        before_update: called when the gradient is complete and the weights are about to change.

    Returns:
        This rank's share of the loss (the ranks' shares add up to it) and the global gradient norm, both
        0-d tensors on the device that the host has not waited for.
    """
    num_targets = all_reduce_sum(torch.full((), batch.num_targets, device=engine.device)).clamp(min=1)
    loss_sum = torch.zeros((), device=engine.device)
    for i, micro_batch in enumerate(batch.micro_batches):
        last = i == len(batch.micro_batches) - 1
        loss_sum += engine.micro_step(micro_batch.to(engine.device), num_targets=num_targets, last=last)
    before_update()
    grad_norm = engine.step(lr)
    return loss_sum / num_targets, grad_norm


def read_back(pending: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Wait for the device, add up the ranks' losses, and return (and forget) the pending records as plain numbers."""
    losses = all_reduce_sum(torch.stack([record["loss"] for record in pending]))
    norms = torch.stack([record["grad_norm"] for record in pending])
    records = [
        {**record, "loss": loss, "grad_norm": norm}
        for record, loss, norm in zip(pending, losses.tolist(), norms.tolist(), strict=True)
    ]
    pending.clear()
    return records


def validate(engine: Engine, split: Any, config: TrainConfig) -> float:
    """Return the mean loss per target over the validation batches, the same for every world size."""
    total = torch.zeros(2, dtype=torch.float64)
    batches = validation_batches(
        split,
        sequence_length=config.data.sequence_length,
        batches=config.validation.batches,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=engine.dp_rank,
        dp_size=engine.dp_size,
    )
    for batch in batches:
        loss = engine.evaluate(batch.to(engine.device))
        num_targets = int((batch.targets != IGNORE_INDEX).sum())
        total += torch.tensor([loss.item(), num_targets], dtype=torch.float64)
    loss_sum, num_targets = all_reduce_sum(total).tolist()
    return loss_sum / num_targets


def record_validation(run: Run, step: int) -> float:
    """Validate, record the result and return the loss."""
    loss = validate(run.engine, run.splits["validation"], run.config)
    run.recorder.event("validation", step=step, loss=loss, perplexity=perplexity(loss))
    return loss


def save(run: Run, step: int, validation_loss: float | None) -> None:
    """Begin to save a checkpoint of step ``step``."""
    record_save(run, run.saver.finish())
    samples = step * run.config.train.global_batch_size
    run.saver.save(
        RunState(
            step=step,
            tokens=samples * run.config.data.sequence_length,
            samples=samples,
            data_fingerprint=run.splits["train"].fingerprint,
            config=redact(to_dict(run.config)),
            versions={"bigtrain": __version__, "torch": torch.__version__, "python": platform.python_version()},
            world_size=dist.get_world_size(),
            validation_loss=validation_loss,
        )
    )


def record_save(run: Run, report: SaveReport | None) -> None:
    """Record how a save has ended, if one has."""
    if report is None:
        return
    if report.error is None:
        run.recorder.event("checkpoint", step=report.step, path=str(report.path))
    else:
        run.recorder.event("checkpoint_failed", step=report.step, error=report.error)
        run.recorder.message(f"saving step {report.step} failed, older checkpoints stay: {report.error}")


def train_loader(split: Any, config: TrainConfig, engine: Engine, *, first_step: int) -> TrainLoader:
    """Return the loader of this rank's part of every step from ``first_step`` on."""
    return TrainLoader(
        split,
        sequence_length=config.data.sequence_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        dp_rank=engine.dp_rank,
        dp_size=engine.dp_size,
        seed=config.train.seed,
        first_step=first_step,
        prefetch_steps=config.data.prefetch_steps,
        pin_memory=engine.device.type == "cuda",
    )


def open_splits(config: TrainConfig) -> Mapping[str, Any]:
    """Prepare the data on rank 0 if that has not been done, and open it on every rank."""
    if config.data.source is not DataSource.synthetic:
        on_rank0(lambda: str(prepare(config.data, progress=True)))
    return open_data(config.data, vocab_size=config.model.vocab_size)


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Make the random numbers of a step (dropout) a function of (seed, step, rank), so that none need saving."""
    value = int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=7).digest())
    # torch.manual_seed would, on a machine without a GPU, keep a formatted stack of every call for ever.
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)


def write_run_files(config: TrainConfig) -> None:
    """Put into the run's directory what it needs to be continued and used.

    Raises:
        ConfigError: the directory cannot be written.
    """
    directory = run_directory(config)
    with _writing(directory):
        write_config(directory, config)
        if config.data.source is not DataSource.synthetic:
            keep_tokenizer(directory, prepared_directory(config.data))


def open_recorder(config: TrainConfig, first_step: int, engine: Engine) -> NullRecorder:
    """Return this rank's recorder; all ranks call this.

    Raises:
        ConfigError: the run's directory cannot be written; on all ranks.
    """
    recorder = NullRecorder()

    def open_files() -> None:
        nonlocal recorder
        with _writing(run_directory(config)):
            recorder = build_recorder(config, run_directory(config), 0, first_step, partial(gauges, config, engine))

    on_rank0(open_files)
    return recorder


def gauges(config: TrainConfig, engine: Engine) -> Gauges:
    """Return what rank 0 reads at logging steps."""
    weights = [entry for key, entry in engine.state.entries.items() if key.startswith(MODEL)]
    num_parameters = sum(math.prod(entry.shape) for entry in weights)
    return Gauges(config, engine.device, dist.get_world_size(), num_parameters)


def validate_run(path: Path, *, batches: int | None = None) -> dict[str, float]:
    """Return loss and perplexity of a run's checkpoint on its validation split, on all ranks of this world.

    Args:
        path: directory of the run, or of one of its checkpoints.
        batches: global batches; by default as many as in the run's own validations.

    Raises:
        CheckpointError: no whole checkpoint.
        ConfigError: the run's batch does not divide over this world.
    """
    info = RankInfo.from_env()
    log.setup(info.rank)
    device = pick_device(info)
    directory, _ = locate(path)
    config = read_config(directory)
    config.validation.batches = batches or config.validation.batches
    if problems := check(config, world_size=info.world_size, local_world_size=info.local_world_size):
        raise ConfigError("\n".join(problems))
    init_process_group(info, device)
    _, checkpoint = find_whole(path)
    splits = open_splits(config)
    engine = build_engine(config, lambda: build_model(config.model), info=info, device=device)
    load_checkpoint(checkpoint, engine.state.entries)
    engine.state.commit()
    loss = validate(engine, splits["validation"], config)
    shut_down()
    result = {"step": read_run_state(checkpoint).step, "loss": loss, "perplexity": perplexity(loss)}
    if config.data.source is not DataSource.synthetic:
        index = read_index(directory, check_sizes=False)
        result["unigram_entropy"] = index.validation.unigram_nats_per_token
    return result


def _profiler(run: Run) -> Profiler:
    settings, record = run.config.profile, run.recorder.event
    return Profiler(settings, run.directory, rank=dist.get_rank(), first_step=run.first_step, say=record)


def _before_update(step: int, meter: StepMeter, norms: LayerNorms, saver: Saver) -> None:
    meter.mark(names.FORWARD_BACKWARD_SECONDS)
    norms.before_update(step)
    saver.wait_until_staged()
    meter.mark(names.CHECKPOINT_STALL_SECONDS)


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error}; mend that or choose another run.root") from error


def _last_step_of_launch(run: Run) -> int | None:
    after = run.config.run.stop_after_steps
    return None if after is None else run.first_step + after


def _is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _end(run: Run, step: int, finished: bool, stop_reason: str | None) -> int:
    if run.saver.num_failures:
        last = find_checkpoints(run.directory)
        raise CheckpointError(
            f"step {step} could not be saved, {run.saver.num_failures} failures in a row; the same command continues "
            f"from {last[-1] if last else 'the beginning'} when the reason above is mended"
        )
    if finished:
        run.recorder.event("finished", step=step)
        return EXIT_FINISHED
    reason = stop_reason or "run.stop_after_steps"
    run.recorder.event("stop", step=step, reason=reason)
    run.recorder.message(
        f"stopped by {reason} after step {step}; saved in {run.directory}. The same command continues."
    )
    return EXIT_RESUMABLE


def _check_continuation(state: RunState, config: TrainConfig, fingerprint: str) -> None:
    """Refuse to continue on other data; say aloud what else has changed."""
    if state.data_fingerprint != fingerprint:
        raise CheckpointError(
            f"the checkpoint was trained on other data ({state.data_fingerprint}, now {fingerprint}); "
            "restore the data or choose another run.name"
        )
    old, new = flatten(state.config), flatten(redact(to_dict(config)))
    for key in sorted(new):
        if old.get(key) != new[key] and not key.startswith("run."):
            log.get_logger().warning(f"changed since the checkpoint: {key}: {old.get(key)} -> {new[key]}")


def _num_threads(info: RankInfo) -> int:
    return max(1, (os.cpu_count() or 1) // info.local_world_size)
