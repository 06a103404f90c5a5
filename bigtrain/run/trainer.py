"""A run from its configuration to its end; the loop is in :func:`train` and reads top to bottom."""

import dataclasses
import gc
import math
import platform
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bigtrain import __version__, log
from bigtrain.checkpoint.saver import Saver, SaveReport
from bigtrain.checkpoint.store import Frozen, Origin, RunState, Standing, find_checkpoints
from bigtrain.config import Load, Precision, TrainConfig
from bigtrain.config.convert import from_dict, to_dict
from bigtrain.data.order.cursor import Cursor
from bigtrain.data.read.loader import StepBatch
from bigtrain.data.read.stream import SampleStream
from bigtrain.distributed.collectives import (
    broadcast_json,
    init_process_group,
    on_rank0,
    pick_device,
    shut_down,
)
from bigtrain.engine.base import Engine
from bigtrain.engine.build import build_engine, require_hardware
from bigtrain.errors import (
    EXIT_FINISHED,
    EXIT_NO_RESTART,
    EXIT_RESUMABLE,
    CheckpointError,
    ConfigError,
    NoRestartError,
    of_all_ranks,
)
from bigtrain.log import redact
from bigtrain.models import build_model
from bigtrain.optim.schedule import lr_at
from bigtrain.plan import preflight
from bigtrain.processes import RankInfo
from bigtrain.run.data import (
    cache_of,
    check_continuation,
    count_skipped_shards,
    open_data,
    require_tokenizer,
    train_loader,
    with_steps,
)
from bigtrain.run.directory import continued_model, write_run_files
from bigtrain.run.frozen import describe_frozen, without_frozen
from bigtrain.run.mistakes import write_classification
from bigtrain.run.recording import open_recorder
from bigtrain.run.recovery import (
    claim,
    discard,
    fill_state,
    find_start,
    follow,
    go_back,
    has_moved,
    nothing_to_do,
    require_place,
    require_same_imports,
)
from bigtrain.run.sets import sets_of
from bigtrain.run.standing import begin_standing, explain_end, why_ended
from bigtrain.run.step import read_back, seed_step, train_step
from bigtrain.run.validation import Measured, validate
from bigtrain.supervise.agreement import StopAgreement
from bigtrain.supervise.bad_numbers import BadNumbers, RollBack
from bigtrain.supervise.heartbeat import Heartbeat
from bigtrain.supervise.launch import Launch
from bigtrain.supervise.signals import StopLimits, StopSignal
from bigtrain.supervise.stragglers import Straggler, Stragglers
from bigtrain.tasks import build_objective
from bigtrain.telemetry import names
from bigtrain.telemetry.files import repair
from bigtrain.telemetry.layer_norms import LayerNorms
from bigtrain.telemetry.meter import StepMeter
from bigtrain.telemetry.out_of_memory import explained
from bigtrain.telemetry.profiling import Profiler, save_hang
from bigtrain.telemetry.recorder import NullRecorder

GC_EVERY_STEPS = 1000  # Python's garbage collector runs on all ranks at the same step


@dataclass(slots=True)
class Run:
    """The parts of a run on this rank."""

    config: TrainConfig
    directory: Path
    engine: Engine
    streams: Mapping[str, SampleStream]
    recorder: Any
    saver: Saver
    start: Cursor  # of this launch, or after a rollback
    origin: Origin = field(default_factory=Origin)  # of the run
    standing: Standing = field(default_factory=lambda: Standing("loss", less_is_better=True))  # by its validations
    frozen: Frozen | None = None  # what checkpoints leave out
    rollbacks: int = 0  # because of bad numbers
    signal: StopSignal = field(default_factory=StopSignal)
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    limits: StopLimits | None = None  # on rank 0
    follow: Callable[[], Path] | None = None  # returns, on rank 0, where a renamed or removed directory is now


@dataclass(frozen=True, slots=True)
class End:
    """How a launch ended."""

    code: int
    reason: str


def run(config: TrainConfig, *, outlived: bool = False) -> int:
    """Train by ``config``, resolved and checked, from the newest checkpoint on.

    Args:
        config: the same on all ranks, or rank 0's counts.
        outlived: this process goes on after the run and is not watched then.

    Returns:
        EXIT_FINISHED or EXIT_RESUMABLE.
    """
    info = RankInfo.from_env()
    log.setup(info.rank)
    device = pick_device(info)
    precision = config.engine.precision or (Precision.bf16 if device.type == "cuda" else Precision.fp32)
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=precision))
    require_hardware(precision, device)  # before anything is prepared or written
    report = preflight(
        dataclasses.replace(config, model=continued_model(config.model, config.run.directory)),
        world_size=info.world_size,
        local_world_size=info.local_world_size,
        device_type=device.type,
        precision=config.engine.precision,
    )
    report.require(config.preflight, "goes on regardless")
    init_process_group(info, device)
    # Rank 0's configuration is the configuration of the run.
    own_imports, config = config.imports, from_dict(TrainConfig, broadcast_json(to_dict(config)))
    require_same_imports(own_imports)
    # Some launchers end all ranks as soon as one has ended: all wait until rank 0 has written everything.
    launch = Launch(config.run.directory, info.rank, config.supervision)
    try:
        code = broadcast_json(_run(config, info, device, launch))
        # Not after a failure, when a collective could wait for ever for ranks that are gone.
        shut_down()
    finally:
        if outlived:
            launch.leave()
    return code


def _run(config: TrainConfig, info: RankInfo, device: torch.device, launch: Launch) -> int:
    with launch, explained(config, config.run.directory, info, device):
        end = _train_run(config, info, device, launch)
        launch.end(end.code, end.reason)
        return end.code


def _train_run(config: TrainConfig, info: RankInfo, device: torch.device, launch: Launch) -> End:
    directory = launch.directory
    if on_rank0(directory.is_dir):
        claim(launch)
    start = find_start(config)
    state = start.read_state()
    standing = begin_standing(config, state)
    streams: Mapping[str, SampleStream] = {}
    if config.train.is_open:
        on_rank0(lambda: require_place(config, start))
        streams = open_data(config, state.data if state else None)
        config = with_steps(config, streams["train"], state)
    if state and (told := nothing_to_do(config, state, standing)):
        log.get_logger().info(told)
        on_rank0(lambda: repair(directory))
        launch.heartbeat.step = state.step
        return End(EXIT_FINISHED, why_ended(standing, config.validation) or "finished")
    if not streams:
        on_rank0(lambda: require_place(config, start))
        streams = open_data(config, state.data if state else None)
    changes = check_continuation(state, config, streams["train"], info.world_size) if state else []
    if start.checkpoint:
        on_rank0(lambda: require_tokenizer(start.checkpoint, streams["train"]))
    begin = state.cursor if state else Cursor()
    streams["train"].require_steps(begin, config.train.steps, config.train.global_batch_size)
    model = continued_model(config.model, directory)
    on_rank0(lambda: write_run_files(config, streams["train"].tokenizer_directory, streams["train"].facts))
    claim(launch)
    cache = cache_of(config.data, streams["train"])
    launch.supervise(broadcast_json(uuid.uuid4().hex[:12]), info.local_rank, partial(save_hang, directory), cache)
    engine = build_engine(config, lambda: build_model(model), info=info, device=device)
    fill_state(config, engine, start, info)
    frozen = describe_frozen(engine.state.entries, config.model)
    parts = Run(
        config=config,
        directory=directory,
        engine=engine,
        streams=streams,
        recorder=NullRecorder(),
        saver=Saver(directory, without_frozen(engine.state.entries, frozen), config.checkpoint, is_ours=launch.is_here),
        standing=standing,
        frozen=frozen,
        follow=launch.follow,
        start=begin,
        origin=start.origin,
        rollbacks=state.rollbacks if state else 0,
        signal=launch.signal,
        heartbeat=launch.heartbeat,
        limits=StopLimits(directory, config.run.max_minutes, started=launch.started) if info.rank == 0 else None,
    )
    facts = {"world_size": info.world_size, "attempt": launch.attempt, "after": launch.previous_failure()}
    facts |= {"changed": changes} if changes else {}
    launch.signal.at_once = False
    while True:
        parts.recorder = open_recorder(config, parts.start.step, engine, streams["train"])
        with parts.recorder:
            kind = "resume" if start.read_state() else "start"
            loaded = {"load": Load.weights.name} if start.weights_only else {}
            parts.recorder.event(kind, step=parts.start.step, checkpoint=str(start.checkpoint or ""), **loaded, **facts)
            end = train(parts)
            if isinstance(end, End):
                return end
            launch.heartbeat.enter("starting")
            begin, rollbacks = parts.start, parts.rollbacks
            start = go_back(config, end, streams["train"], start=start, begin=begin, rollbacks=rollbacks)
            bad = {"first_bad_step": end.first_step, "last_bad_step": end.last_step}
            # Record first: a checkpoint recorded as saved and not rolled back has to exist.
            parts.recorder.event("rollback", step=end.last_step, checkpoint=str(start.checkpoint or ""), **bad)
            discard(directory, end)
        parts.rollbacks += 1
        parts.start = fill_state(config, engine, start, info)
        parts.standing = begin_standing(config, start.read_state())


def train(run: Run) -> End | RollBack:
    """Run the loop until completion, a stop request, or a rollback.

    Raises:
        CheckpointError: saving has failed too often, or at the end.
    """
    config, engine, recorder, saver, heartbeat = run.config, run.engine, run.recorder, run.saver, run.heartbeat
    steps, objective = config.train.steps, build_objective(config.task)
    unit, size = _unit(run.streams["train"])
    meter = StepMeter(config.train.global_batch_size * size, device=engine.device, unit=unit)
    norms = LayerNorms(engine, config.logging.layer_norms_every_steps)
    agreement, judge, pending = StopAgreement(), BadNumbers(config.bad_numbers), []
    loader = train_loader(run.streams["train"], config, engine, start=run.start)
    stragglers = Stragglers(engine.device, config.supervision.straggler_factor)
    heartbeat.step, verdict, ended, measured = run.start.step, None, None, None
    keeps_best = "best" in config.checkpoint.keep

    def before_update() -> None:
        meter.mark(names.FORWARD_BACKWARD_SECONDS)
        norms.before_update(step)
        heartbeat.enter("optimizer")
        saver.wait_until_staged()
        meter.mark(names.CHECKPOINT_STALL_SECONDS)

    gc.disable()
    gc.freeze()  # a collection would look through all modules, for a tenth of a second
    with loader, _profiler(run) as profiler:
        for batch in heartbeat.during("data", loader):
            meter.data_ready(batch.micro_batches)
            heartbeat.enter("forward_backward")
            step = batch.step + 1
            lr = lr_at(batch.step, peak_lr=config.optimizer.lr, num_steps=steps, config=config.scheduler)
            seed_step(config.train.seed, batch.step, engine.mesh.rank, engine.device)
            loss, grad_norm = train_step(engine, batch, lr, before_update=before_update)
            meter.mark(names.OPTIMIZER_SECONDS)
            norms.after_update(step)
            heartbeat.enter("logging")
            pace = meter.step_done(batch.after.samples * size)
            pending.append({"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, **pace})
            pending[-1] |= {names.DATA_WAIT_SECONDS: loader.wait_seconds, names.DATA_DIGEST: batch.after.digest}

            record_save(run, saver.poll())
            stopping = _why_to_stop(run, agreement, step)
            finished, measured = step == steps, None
            saving = stopping or finished or _is_due(step, config.checkpoint.every_steps)
            validating = _is_due(step, config.validation.every_steps) or (finished and config.validation.every_steps)
            if saving or validating or step % config.train.log_every_steps == 0:
                records = norms.merge(read_back(pending, objective, engine.mesh))
                records[-1] |= count_skipped_shards(run.streams["train"], config)
                recorder.metrics(records, meter.phases())
                record_stragglers(run, stragglers.check(step, heartbeat.seconds_in("data")))
                if verdict := record_bad_numbers(run, judge, records):
                    break
            meter.mark(names.LOGGING_SECONDS)
            if validating:
                heartbeat.enter("validation")
                measured = record_validation(run, batch.after)
                ended = why_ended(run.standing, config.validation)
                saving = saving or ended or (keeps_best and run.standing.best_step == step)
                meter.skip()
            if saving:
                heartbeat.enter("checkpoint")
                save(run, batch, measured, last=bool(finished or stopping or ended))
                meter.skip()
            if profiler.step_done(step):
                meter.skip()
            if step % GC_EVERY_STEPS == 0:
                gc.collect()
            if finished or stopping or ended:
                break
        agreement.settle()
        heartbeat.enter("checkpoint")
        record_save(run, saver.finish())
        if measured and (finished or ended) and measured.confusion is not None:
            heartbeat.enter("validation")
            write_classification(run.directory, measured, engine, run.streams, config, step=step)
    gc.unfreeze()
    gc.enable()
    return verdict or _end(run, step, "finished" if finished else ended, stopping, has_good=judge.has_good)


def _why_to_stop(run: Run, agreement: StopAgreement, step: int) -> str | None:
    """Return why all ranks stop after this step, None if they go on; all ranks call this."""
    if run.saver.num_failures >= run.config.checkpoint.max_failures:
        run.signal.request("checkpoint.max_failures")
    if run.limits:
        run.signal.request(run.limits.reached())
    last = run.start.step + (run.config.run.stop_after_steps or math.inf)
    return agreement.poll(run.signal.reason) or ("run.stop_after_steps" if step == last else None)


def record_validation(run: Run, done: Cursor) -> Measured:
    """Validate, record the result and return it."""
    sets, batches = sets_of(run.streams, "validation"), run.config.validation.batches
    measured = validate(run.engine, sets, run.config, batches=batches)
    metrics = measured.metrics
    if (metric := run.standing.metric) not in metrics:
        problem = f"validation.metric={metric}: these data have none; they have {', '.join(metrics)}"
        raise of_all_ranks(ConfigError(problem))
    run.standing = run.standing.after(done.step, metrics[metric])
    unit, size = _unit(run.streams["train"])
    run.recorder.event("validation", step=done.step, **{unit: done.samples * size}, **metrics)
    if run.config.validation.written_samples:
        run.recorder.event("written", step=done.step, samples=measured.texts)
    return measured


def save(run: Run, batch: StepBatch, measured: Measured | None, *, last: bool) -> None:
    """Begin to save a checkpoint of the step of ``batch``; the last one follows a renamed directory."""
    record_save(run, run.saver.finish())
    if last and run.follow:
        run.directory = run.saver.run_directory = follow(run.config, run.follow, run.streams["train"])
    stream, cursor = run.streams["train"], batch.after
    run.saver.save(
        RunState(
            step=cursor.step,
            tokens=cursor.samples * (stream.sequence_length or 0),
            samples=cursor.samples,
            data_fingerprint=stream.fingerprint,
            config=redact(to_dict(run.config)),
            versions={"bigtrain": __version__, "torch": torch.__version__, "python": platform.python_version()},
            world_size=dist.get_world_size(),
            validation_loss=measured.metrics["loss"] if measured else None,
            data=stream.state(batch.before, cursor),
            rollbacks=run.rollbacks,
            origin=run.origin,
            frozen=run.frozen,
            standing=run.standing,
        )
    )


def record_save(run: Run, report: SaveReport | None) -> None:
    """Record the end of a save, if one has ended."""
    if report is None:
        return
    run.heartbeat.took("checkpoint", report.seconds)
    if run.limits:
        run.limits.save_seconds = max(run.limits.save_seconds, report.seconds)
    if report.error is None:
        run.recorder.event("checkpoint", step=report.step, path=str(report.path))
    else:
        run.recorder.event("checkpoint_failed", step=report.step, error=report.error)
        run.recorder.message(f"saving step {report.step} failed, older checkpoints stay: {report.error}")


def record_bad_numbers(run: Run, judge: BadNumbers, records: list[dict[str, Any]]) -> RollBack | None:
    """Record the bad steps; return the rollback, if one is due."""
    found, verdict = judge.judge(records)
    for bad in found:
        run.recorder.event("bad_step", step=bad.step, why=bad.why)
        run.recorder.message(f"step {bad.step} is bad: {bad.why}")
    return verdict


def record_stragglers(run: Run, found: list[Straggler]) -> None:
    """Name the ranks that keep the others waiting."""
    for slow in found:
        run.recorder.event("straggler", step=run.heartbeat.step, rank=slow.rank, why=slow.why)
        run.recorder.message(f"rank {slow.rank} keeps the others waiting: it {slow.why}")


def _profiler(run: Run) -> Profiler:
    settings, record, begin = run.config.profile, run.recorder.event, partial(run.heartbeat.enter, "profile")
    return Profiler(settings, run.directory, rank=dist.get_rank(), first_step=run.start.step, say=record, begin=begin)


def _unit(stream: SampleStream) -> tuple[str, int]:
    """Return what is counted, tokens or samples, and how many of them a sample is."""
    return (names.TOKENS, stream.sequence_length) if stream.sequence_length else (names.SAMPLES, 1)


def _is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _end(run: Run, step: int, finished: str | None, reason: str | None, *, has_good: bool) -> End:
    if run.saver.num_failures:
        last = find_checkpoints(run.directory)
        problem = (
            f"step {step} could not be saved, {run.saver.num_failures} failures in a row: {run.saver.last_error}; the same "
            f"command continues from {last[-1] if last else run.origin.checkpoint or 'the beginning'} when that is mended"
        )
        raise of_all_ranks(CheckpointError(problem))
    if finished and run.start.step == 0 and not has_good:
        problem = (
            f"all {step} steps of {run.directory} have bad numbers, so nothing was learnt; it diverges: lower optimizer.lr, "
            "or look at the data; events.jsonl has every bad step"
        )
        raise of_all_ranks(NoRestartError(problem))
    if run.limits:
        run.limits.honour()
    if finished:
        if tests := sets_of(run.streams, "test"):
            run.recorder.event("test", step=step, **validate(run.engine, tests, run.config, batches=None).metrics)
        why = {} if finished == "finished" else {"reason": explain_end(run.standing, finished)}
        run.recorder.event("finished", step=step, **why)
        return End(EXIT_FINISHED, finished)
    run.recorder.event("stop", step=step, reason=reason)
    if run.directory != run.config.run.directory:
        run.recorder.message(f"stopped by {reason} after step {step}: {has_moved(run.config, run.directory)}")
        return End(EXIT_NO_RESTART, str(reason))
    run.recorder.message(
        f"stopped by {reason} after step {step}; saved in {run.directory}. The same command continues."
    )
    return End(EXIT_RESUMABLE, str(reason))
