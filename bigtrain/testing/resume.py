"""Is a resumed run the uninterrupted one? Both are trained, with a user's own configuration, and compared.

::

    whole    0 ───────────── N ──────────── N + M
    parts    0 ───────────── N ── kill -9             in the middle of step N + 2, when the checkpoint of N is complete
                             N ──────────── N + M     resumed, if so wanted under another engine or world size

The ranks are processes of their own and run the trainer as always, except that what they compute a step
from is noted, and that one launch kills itself.
"""

import hashlib
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigtrain.checkpoint.shard import TensorReader
from bigtrain.checkpoint.store import RunState, checkpoint_path, find_checkpoints, read_run_state
from bigtrain.config import EngineKind, ParallelConfig, Precision, TrainConfig, WandbMode
from bigtrain.config.parallel import shared
from bigtrain.data.read.loader import StepBatch
from bigtrain.engine.base import Engine
from bigtrain.engine.state import MODEL, OPTIMIZER
from bigtrain.errors import BigtrainError
from bigtrain.plan.report import with_settings
from bigtrain.run import launching, trainer
from bigtrain.run.data import prepare_data
from bigtrain.telemetry.files import METRICS_FILE, read_jsonl
from bigtrain.testing.ranks import RankFailedError, run_ranks

TOLERANCES = {Precision.fp32: 1e-6, Precision.bf16: 2e-3}
"""Relative difference of losses between engines or world sizes: sums over ranks are rounded differently."""
NORM_FACTOR = 10  # of norms and weights: both add up rounding that a mean loss averages out
TIMEOUT_SECONDS = 3600.0  # of one launch
SAVE_TIMEOUT_SECONDS = 600.0  # from the kill in the middle of a step to its checkpoint
MARKER_FILE = "killed"

RunFunction = Callable[[TrainConfig], int]
Samples = dict[int, list[str]]  # hashes of the samples of each step


@dataclass(frozen=True, slots=True)
class Plan:
    """How long, on what and how the run is resumed."""

    before: int  # steps before the checkpoint that is resumed from, at least 2
    after: int  # steps after it, at least 2
    world_size: int  # ranks of the uninterrupted and of the killed launch
    resume_world_size: int  # ranks of the resumed launch
    resume_engine: EngineKind  # engine of the resumed launch
    resume_parallel: ParallelConfig  # layout of the resumed launch


@dataclass(frozen=True, slots=True)
class Check:
    """One quantity over some steps."""

    name: str
    steps: str
    difference: float  # largest, relative; infinite where something is missing or not a number
    allowed: float

    @property
    def holds(self) -> bool:
        return self.difference <= self.allowed


@dataclass(frozen=True, slots=True)
class Verdict:
    checks: list[Check]
    first_difference: str | None  # the earliest difference that is not allowed
    is_bitwise: bool  # whether engine and world size were the same, so that no difference at all is allowed

    @property
    def holds(self) -> bool:
        """Whether the resumed run is the uninterrupted one."""
        return self.first_difference is None


def verify_resume(
    config: TrainConfig,
    plan: Plan,
    root: Path,
    *,
    resume: RunFunction = launching.run,
    say: Callable[[str], None] = print,
) -> Verdict:
    """Train without and with an interruption, and compare; the ranks of the resumed launch call ``resume``."""
    prepare_data(config.data)
    root.mkdir(parents=True)
    whole, killed, resumed = _launches(config, plan, root)
    last = plan.before + plan.after
    say(f"uninterrupted  {_where(whole, plan.world_size)}: steps 1 to {last}")
    whole_samples = _launch(whole, plan.world_size, root / "whole.log")
    say(f"killed         {_where(killed, plan.world_size)}: kill -9 in step {plan.before + 2}")
    _launch_and_kill(killed, plan, root)
    say(f"resumed        {_where(resumed, plan.resume_world_size)}: steps {plan.before + 1} to {last}")
    resumed_samples = _launch(resumed, plan.resume_world_size, root / "resumed.log", run=resume)
    return _compare(
        Outcome.read(whole.run.directory, whole_samples, last),
        Outcome.read(resumed.run.directory, resumed_samples, last),
        plan,
        is_bitwise=_layout(resumed, plan.resume_world_size) == _layout(whole, plan.world_size),
    )


def _launches(config: TrainConfig, plan: Plan, root: Path) -> tuple[TrainConfig, TrainConfig, TrainConfig]:
    """Return the configurations of the three launches; the schedule stays that of the user's run."""
    last = plan.before + plan.after

    def launch(
        name: str, engine: EngineKind, parallel: ParallelConfig, steps: int, every_steps: int, resume: str
    ) -> TrainConfig:
        changes = {
            "train.steps": max(config.train.steps, last),
            "train.epochs": None,
            "train.tokens": None,
            "logging.wandb": WandbMode.disabled,
            "run.root": str(root),
            "run.name": name,
            "run.stop_after_steps": steps,
            "engine.kind": engine,
            "parallel": parallel,
            "checkpoint.every_steps": every_steps,
            "checkpoint.resume": resume,
        }
        return with_settings(config, tuple(changes.items()))

    kind, parallel = config.engine.kind, config.parallel
    return (
        launch("whole", kind, parallel, last, 0, "never"),
        launch("parts", kind, parallel, last, plan.before, "never"),
        launch("parts", plan.resume_engine, plan.resume_parallel, plan.after, 0, "must"),
    )


def _layout(config: TrainConfig, world_size: int) -> tuple[EngineKind, ParallelConfig, int]:
    return config.engine.kind, config.parallel, world_size


def _where(config: TrainConfig, world_size: int) -> str:
    layout = "".join(f" with {setting.removeprefix('parallel.')}" for setting in shared(config.parallel))
    return f"{config.engine.kind.name}{layout} on {world_size} {'rank' if world_size == 1 else 'ranks'}"


def _launch(
    config: TrainConfig,
    world_size: int,
    log: Path,
    *,
    run: RunFunction = launching.run,
    kill_in_step: int | None = None,
) -> Samples:
    """Train on new ranks; return the samples of all ranks together by step."""
    try:
        parts = run_ranks(_train, world_size, config, run, kill_in_step, log, timeout_seconds=TIMEOUT_SECONDS)
    except RankFailedError as error:
        raise BigtrainError(f"{_where(config, world_size)}: the training failed (more in {log}):\n{error}") from error
    parallel = config.parallel
    parts = parts[: world_size // parallel.pp : parallel.tp * parallel.cp]  # the others of a data rank load the same
    return {step: sorted(sample for part in parts for sample in part[step]) for step in parts[0]}


def _launch_and_kill(config: TrainConfig, plan: Plan, root: Path) -> None:
    """Train until the ranks kill themselves; check that they did, and what they left."""
    try:
        _launch(config, plan.world_size, root / "killed.log", kill_in_step=plan.before + 2)
    except BigtrainError:
        if not (root / MARKER_FILE).exists():
            raise
    found = find_checkpoints(config.run.directory)
    expected = checkpoint_path(config.run.directory, plan.before)
    assert found == [expected], f"the killed launch left {found}, expected {expected}"


def _train(config: TrainConfig, run: RunFunction, kill_in_step: int | None, log: Path) -> Samples:
    """Train as one rank; return its samples by step."""
    with log.open("a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    if torch.cuda.is_available():
        # Some backward kernels accumulate in the order in which threads arrive.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    samples: Samples = {}
    train_step = trainer.train_step

    def watched(
        engine: Engine, batch: StepBatch, lr: float, *, before_update: Callable[[], None] = lambda: None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step = batch.step + 1
        samples[step] = [
            _digest(*row) for micro_batch in batch.micro_batches for row in zip(*micro_batch.values(), strict=True)
        ]

        def die_or_update() -> None:
            before_update()
            if step == kill_in_step:
                _die(config, Path(config.run.root))

        return train_step(engine, batch, lr, before_update=die_or_update)

    trainer.train_step = watched  # in this process, which trains once and ends
    run(config)
    return samples


def _digest(*sample: torch.Tensor) -> str:
    return hashlib.blake2b(b"".join(tensor.numpy().tobytes() for tensor in sample), digest_size=8).hexdigest()


def _die(config: TrainConfig, root: Path) -> None:
    """Wait until the checkpoint, which is written in the background, is complete, and kill this process."""
    deadline = time.monotonic() + SAVE_TIMEOUT_SECONDS
    while not find_checkpoints(config.run.directory):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no checkpoint in {config.run.directory} after {SAVE_TIMEOUT_SECONDS:.0f} seconds")
        time.sleep(0.01)
    (root / MARKER_FILE).touch()
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Outcome:
    metrics: dict[int, dict[str, Any]]  # records of ``metrics.jsonl``, and the samples, by step
    state: RunState
    tensors: TensorReader  # of the last checkpoint

    @staticmethod
    def read(run: Path, samples: Samples, last: int) -> "Outcome":
        """Read the files of a run that ends with step ``last``."""
        final = checkpoint_path(run, last)
        records = {record["step"]: record for record in read_jsonl(run / METRICS_FILE)}
        metrics = {step: records.get(step, {}) | {"samples": samples.get(step)} for step in range(1, last + 1)}
        return Outcome(metrics, read_run_state(final), TensorReader(final))


def _compare(whole: Outcome, parts: Outcome, plan: Plan, *, is_bitwise: bool) -> Verdict:
    tolerance = 0.0 if is_bitwise else TOLERANCES[Precision[whole.state.config["engine"]["precision"]].base]
    last = plan.before + plan.after
    before, after = range(1, plan.before + 1), range(plan.before + 1, last + 1)
    quantities = [
        ("samples", after, 0.0),
        ("data_digest", after, 0.0),
        ("lr", after, 0.0),
        ("loss", before, 0.0),
        ("loss", after, tolerance),
        ("grad_norm", before, 0.0),
        ("grad_norm", after, NORM_FACTOR * tolerance),
    ]
    checks, differences = [], []
    for name, steps, allowed in quantities:
        found = {step: _difference(whole.metrics[step].get(name), parts.metrics[step].get(name)) for step in steps}
        checks.append(Check(name, f"{steps[0]} to {steps[-1]}", max(found.values()), allowed))
        differences += [(step, name) for step in steps if found[step] > allowed]
    first = None
    if differences:
        step, name = min(differences, key=lambda difference: difference[0])
        first = f"step {step}, {name}: {_contrast(whole.metrics[step].get(name), parts.metrics[step].get(name))}"
        if step <= plan.before:
            first += "; that is before the kill: this training does not give the same numbers twice by itself"
    for name, prefix in [("weights", MODEL), ("optimizer state", OPTIMIZER)][: 2 if is_bitwise else 1]:
        difference, key = _compare_tensors(whole.tensors, parts.tensors, prefix)
        checks.append(Check(name, str(last), difference, NORM_FACTOR * tolerance))
        if not checks[-1].holds and first is None:
            first = f"step {last}, {name}: {key} differs"
    return Verdict(checks, first, is_bitwise)


def _difference(value: Any, other: Any) -> float:
    """Return the relative difference of two numbers; of anything else 0 if equal, else infinity."""
    if value == other and value is not None:
        return 0.0
    if isinstance(value, float) and isinstance(other, float):
        return abs(value - other) / max(abs(value), abs(other))
    return math.inf


def _contrast(value: Any, other: Any) -> str:
    if isinstance(value, list):
        return f"{len(set(value) - set(other or ()))} of {len(value)} are missing in the resumed run"
    return f"{value} uninterrupted, {other} resumed"


def _compare_tensors(whole: TensorReader, parts: TensorReader, prefix: str) -> tuple[float, str | None]:
    """Return the norm of the difference of all tensors over their norm, and the first tensor that differs."""
    square = square_of_difference = 0.0
    first = None
    for key in (key for key in whole.records if key.startswith(prefix)):
        ours, theirs = whole.read(key), parts.read(key)
        square += ours.double().square().sum().item()
        if ours.dtype != theirs.dtype or not torch.equal(_bits(ours), _bits(theirs)):
            first = first or key
            square_of_difference += (ours.double() - theirs.double()).square().sum().item()
    if first is None:
        return 0.0, None
    relative = math.sqrt(square_of_difference / square) if square else math.inf
    return relative if relative > 0 else math.inf, first


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
