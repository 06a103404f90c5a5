"""The loop of a run, in :func:`train`, which reads top to bottom, and what it does between steps."""

import dataclasses
import gc
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bigtrain import __version__
from bigtrain.checkpoint.saver import Saver, SaveReport
from bigtrain.checkpoint.store import Frozen, Origin, RunState, Standing, find_checkpoints
from bigtrain.config import TrainConfig
from bigtrain.config.convert import to_dict
from bigtrain.data.order.cursor import Cursor
from bigtrain.data.read.loader import StepBatch
from bigtrain.data.read.stream import SampleStream
from bigtrain.distributed.collectives import on_rank0
from bigtrain.engine.base import Engine
from bigtrain.errors import (
    EXIT_FINISHED,
    EXIT_NO_RESTART,
    EXIT_RESUMABLE,
    CheckpointError,
    ConfigError,
    NoRestartError,
    of_all_ranks,
)
from bigtrain.files import writing
from bigtrain.log import redact
from bigtrain.optim.schedule import lr_at
from bigtrain.run.data import count_skipped_shards, sets_of, train_loader
from bigtrain.run.directory import write_run_files
from bigtrain.run.generated import keep_images
from bigtrain.run.privacy import Account
from bigtrain.run.recovery import explain_end, why_ended
from bigtrain.run.robustness import fgsm_accuracy
from bigtrain.run.sampling import continue_prompts
from bigtrain.run.step import averaged, expert_load, read_back, seed_step, train_step
from bigtrain.run.validation import Measured, score_tasks, validate, write_classification
from bigtrain.supervise.agreement import StopAgreement
from bigtrain.supervise.bad_numbers import BadNumbers, RollBack
from bigtrain.supervise.launch import Launch
from bigtrain.supervise.signals import StopLimits
from bigtrain.supervise.stragglers import Stragglers
from bigtrain.tasks import build_objective
from bigtrain.telemetry import names
from bigtrain.telemetry.layer_norms import LayerNorms
from bigtrain.telemetry.meter import StepMeter
from bigtrain.telemetry.profiling import Profiler

GC_EVERY_STEPS = 1000  # Python's garbage collector runs on all ranks at the same step


@dataclass(slots=True)
class Run:
    config: TrainConfig
    launch: Launch
    engine: Engine
    streams: Mapping[str, SampleStream]
    recorder: Any
    saver: Saver
    start: Cursor  # of this launch, or after a rollback
    origin: Origin = field(default_factory=Origin)  # of the run
    standing: Standing = field(default_factory=lambda: Standing("loss", less_is_better=True))  # by its validations
    account: Account | None = None  # of a private run
    frozen: Frozen | None = None  # what checkpoints leave out
    rollbacks: int = 0  # because of bad numbers
    limits: StopLimits | None = None  # on rank 0

    @property
    def unit(self) -> tuple[str, int]:
        """What is counted, tokens or samples, and how many of them a sample is."""
        length = self.streams["train"].sequence_length
        return (names.TOKENS, length) if length else (names.SAMPLES, 1)

    def spent(self, step: int) -> dict[str, float]:
        """Return the metrics of a private run after some steps."""
        return self.account.metrics(step) if self.account else {}

    def tell(self, message: str, kind: str, **facts: Any) -> None:
        self.recorder.event(kind, **facts)
        self.recorder.message(message)


@dataclass(frozen=True, slots=True)
class End:
    code: int
    reason: str


def train(run: Run) -> End | RollBack:
    """Run the loop until completion, a stop request, or a rollback; CheckpointError if saving fails too often."""
    config, engine, saver, heartbeat = run.config, run.engine, run.saver, run.launch.heartbeat
    steps, size, objective = config.train.steps, run.unit[1], build_objective(config.task)
    meter = StepMeter(config.train.global_batch_size * size, device=engine.device, unit=run.unit[0])
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
                skipped = count_skipped_shards(run.streams["train"], config)
                records[-1] |= skipped | expert_load(engine) | averaged(engine) | run.spent(step)
                run.recorder.metrics(records, meter.phases())
                for slow in stragglers.check(step, heartbeat.seconds_in("data")):
                    told = f"rank {slow.rank} keeps the others waiting: it {slow.why}"
                    run.tell(told, "straggler", step=step, rank=slow.rank, why=slow.why)
                found, verdict = judge.judge(records)
                for bad in found:
                    run.tell(f"step {bad.step} is bad: {bad.why}", "bad_step", step=bad.step, why=bad.why)
                if verdict:
                    break
            meter.mark(names.LOGGING_SECONDS)
            if validating:
                heartbeat.enter("validation")
                measured = _validate(run, batch.after)
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
    gc.unfreeze()
    gc.enable()
    return verdict or _end(run, step, "finished" if finished else ended, stopping, measured, judge)


def _profiler(run: Run) -> Profiler:
    settings, begin = run.config.profile, partial(run.launch.heartbeat.enter, "profile")
    place, say = run.launch.directory, run.recorder.event
    return Profiler(settings, place, rank=dist.get_rank(), first_step=run.start.step, say=say, begin=begin)


def _is_due(step: int, every_steps: int) -> bool:
    return every_steps > 0 and step % every_steps == 0


def _why_to_stop(run: Run, agreement: StopAgreement, step: int) -> str | None:
    """Return why all ranks stop after this step, None if they go on; all ranks call this."""
    signal = run.launch.signal
    if run.saver.num_failures >= run.config.checkpoint.max_failures:
        signal.request("checkpoint.max_failures")
    if run.limits:
        signal.request(run.limits.reached())
    last = run.start.step + (run.config.run.stop_after_steps or math.inf)
    return agreement.poll(signal.reason) or ("run.stop_after_steps" if step == last else None)


def _validate(run: Run, done: Cursor) -> Measured:
    settings, metric = run.config.validation, run.standing.metric
    measured = validate(run.engine, sets_of(run.streams, "validation"), run.config, batches=settings.batches)
    metrics = measured.metrics | score_tasks(run.engine, run.config, run.launch.directory)
    metrics |= fgsm_accuracy(run.engine, sets_of(run.streams, "validation"), run.config)
    if metric not in metrics:
        problem = f"validation.metric={metric}: these data have none; they have {', '.join(metrics)}"
        raise of_all_ranks(ConfigError(problem))
    run.standing = run.standing.after(done.step, metrics[metric])
    unit, size = run.unit
    run.recorder.event("validation", step=done.step, **{unit: done.samples * size}, **metrics)
    if settings.written_samples:
        run.recorder.event("written", step=done.step, samples=measured.texts)
    continue_prompts(run.engine, run.config, run.launch.directory, step=done.step)
    keep_images(run.engine, run.config, run.launch.directory, step=done.step)
    return measured


def save(run: Run, batch: StepBatch, measured: Measured | None, *, last: bool) -> None:
    """Begin to save a checkpoint of the step of ``batch``; the last one follows a renamed directory."""
    record_save(run, run.saver.finish())
    stream, cursor = run.streams["train"], batch.after
    if last:
        run.launch.directory = run.saver.run_directory = Path(on_rank0(lambda: _follow(run)))
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


def _follow(run: Run) -> str:
    """Return where the run's directory is now, on rank 0; one that was removed becomes that of a run again."""
    config, stream = run.config, run.streams["train"]
    with writing(config.run.directory):
        place = run.launch.follow()
    if place != config.run.directory:
        settings = dataclasses.replace(config.run, root=str(place.parent), name=place.name)
        write_run_files(dataclasses.replace(config, run=settings), stream.tokenizer_directory, stream.facts)
    return str(place)


def record_save(run: Run, report: SaveReport | None) -> None:
    if report is None:
        return
    run.launch.heartbeat.took("checkpoint", report.seconds)
    if run.limits:
        run.limits.save_seconds = max(run.limits.save_seconds, report.seconds)
    if report.error is None:
        run.recorder.event("checkpoint", step=report.step, path=str(report.path))
    else:
        told = f"saving step {report.step} failed, older checkpoints stay: {report.error}"
        run.tell(told, "checkpoint_failed", step=report.step, error=report.error)


def _end(
    run: Run, step: int, finished: str | None, reason: str | None, measured: Measured | None, judge: BadNumbers
) -> End:
    config, directory = run.config, run.launch.directory
    if run.saver.num_failures:
        last = find_checkpoints(directory)
        problem = (
            f"step {step} could not be saved, {run.saver.num_failures} failures in a row: {run.saver.last_error}; the same "
            f"command continues from {last[-1] if last else run.origin.checkpoint or 'the beginning'} when that is mended"
        )
        raise of_all_ranks(CheckpointError(problem))
    if finished and run.start.step == 0 and not judge.has_good:
        problem = (
            f"all {step} steps of {directory} have bad numbers, so nothing was learnt; it diverges: lower optimizer.lr, "
            "or look at the data; events.jsonl has every bad step"
        )
        raise of_all_ranks(NoRestartError(problem))
    if run.limits:
        run.limits.honour()
    if finished:
        run.launch.heartbeat.enter("validation")
        if measured and measured.confusion is not None:
            write_classification(directory, measured, run.engine, run.streams, config, step=step)
        if tests := sets_of(run.streams, "test"):
            run.recorder.event("test", step=step, **validate(run.engine, tests, config, batches=None).metrics)
        why = {} if finished == "finished" else {"reason": explain_end(run.standing, finished)}
        run.recorder.event("finished", step=step, **why)
        return End(EXIT_FINISHED, finished)
    if directory == config.run.directory:
        told, code = f"; saved in {directory}. The same command continues.", EXIT_RESUMABLE
    else:
        how = f"run.root={directory.parent} run.name={directory.name} continue from there"
        told, code = f": {config.run.directory} was renamed or removed; {how}", EXIT_NO_RESTART
    run.tell(f"stopped by {reason} after step {step}{told}", "stop", step=step, reason=reason)
    return End(code, str(reason))
