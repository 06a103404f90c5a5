"""The trainer's recorder: passes metrics, events and messages to files and displays.

Per run directory: ``metrics.jsonl`` with exactly one object per optimizer step, ``events.jsonl`` with all other events,
``log/train.log`` with the console's lines. A resumed run repeats the steps after its checkpoint, so their lines are
removed, and so are the validations and checkpoints after it; starts, resumes, stops and faults stay.
"""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from bigtrain.config import TrainConfig, WandbMode, parts
from bigtrain.log import redact
from bigtrain.telemetry import names, tensorboard_logger, wandb_logger
from bigtrain.telemetry.companion import Companion
from bigtrain.telemetry.console import Console
from bigtrain.telemetry.files import EVENTS_FILE, METRICS_FILE, JsonLines
from bigtrain.telemetry.text import describe_communication, describe_metrics, number, pace

if TYPE_CHECKING:  # it imports torch
    from bigtrain.telemetry.gauges import Gauges
    from bigtrain.telemetry.peak import Peak

LOG_FILE = "log/train.log"

_MAX_ERROR_CHARACTERS = 2000
_SAME = 1e-5  # relative rounding difference of a repeated step at another world size
_DURABLE_EVENTS = ("checkpoint", "rollback", "finished", "stop", "fault")


class NullRecorder:
    """No-op recorder for ranks other than 0."""

    peak: "Peak | None" = None  # of this rank's device

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def metrics(self, records: list[dict[str, Any]], phases: dict[str, float] | None = None) -> None: ...

    def event(self, kind: str, **fields: Any) -> None: ...

    def message(self, text: str) -> None: ...

    def close(self) -> None: ...


class Recorder(NullRecorder):
    """Rank 0's recorder. No method raises because a disk, a terminal or a server fails."""

    def __init__(
        self, config: TrainConfig, run_directory: Path, resume_step: int, gauges: "Gauges | None" = None
    ) -> None:
        """Open the files (OSError) and start the dashboards; ``resume_step`` is 0 for a new run."""
        self._gauges, self._last_step = gauges, resume_step
        self._metrics = JsonLines(run_directory / METRICS_FILE)
        self._given_up: dict[int, tuple[Any, ...]] = {}
        self._facts: dict[str, Any] = {"superseded_steps": self._metrics.remove(partial(self._give_up, resume_step))}
        self._events = JsonLines(run_directory / EVENTS_FILE)
        self._events.remove(
            lambda event: (
                event.get("event") in names.REPEATED_EVENTS
                and (event.get(names.STEP, 0) > resume_step or resume_step == 0)
            )
        )
        self._console = Console(config.train.steps, run_directory / LOG_FILE).__enter__()
        if gauges:
            self.peak = gauges.peak
            self._facts |= gauges.describe()
        self._dashboards = _start_dashboards(config, run_directory, is_new=resume_step == 0)
        self._is_closed = False
        self._own: list[OwnLogger] = []
        for name in config.logging.also:
            self._own.append(OwnLogger(name, run_directory, self._tell_failed))

    def metrics(self, records: list[dict[str, Any]], phases: dict[str, float] | None = None) -> None:
        """Write a line per step and show the last with phases, gauges and pace; called before each checkpoint too."""
        if not records:
            return
        step_seconds, rate = pace(records)
        if self._gauges:
            read = self._gauges.read(records, phases or {}, step_seconds=step_seconds, rate=rate)
            records = [*records[:-1], records[-1] | read]
        for record in records:
            self._compare(record)
            self._metrics.write(record)
        self._last_step = records[-1][names.STEP]
        self._metrics.flush()
        self._console.metrics({**records[-1], names.STEP_SECONDS: step_seconds, names.rate_of(records[-1]): rate})
        for logger in self._own:
            logger.call("metrics", records)

    def _tell_failed(self, name: str, why: str) -> None:
        self.message(f"logging.also={name}: {why}; the run goes on without")
        self.event(names.LOGGER_FAILED_EVENT, step=self._last_step, error=f"{name}: {why}")

    def _give_up(self, resume_step: int, record: dict[str, Any]) -> bool:
        """Return whether the step of a record is done again; keeps its outcome for comparison."""
        step = record.get(names.STEP, 0)
        if step > resume_step:
            self._given_up[step] = _outcome(record)
        return step > resume_step

    def _compare(self, record: dict[str, Any]) -> None:
        """Write one event, before the steps, if repeated steps have other numbers than before."""
        before = self._given_up.pop(record[names.STEP], None)
        if before is not None and not _agree(before, _outcome(record)):
            last = max(self._given_up, default=record[names.STEP])
            self._given_up.clear()
            self.event(names.SUPERSEDED_EVENT, step=record[names.STEP], last_step=last)

    def event(self, kind: str, **fields: Any) -> None:
        """Write an event with its ``step`` and, where a person waits for it, show it."""
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        if kind in names.LAUNCH_EVENTS:
            fields |= self._facts
        event = redact({"event": kind, **fields, "time": time})
        self._events.write(event)
        self._console.event(event)
        is_durable = kind in _DURABLE_EVENTS
        if is_durable:
            self._metrics.flush(durable=True)
        self._events.flush(durable=is_durable)
        if sentence := _sentence(kind, fields):
            self._console.message(sentence)
        for logger in self._own:
            logger.call("event", event)

    def message(self, text: str) -> None:
        self._console.message(text)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if isinstance(error, Exception):
            text = f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARACTERS]
            self._console.keep(text)
            self.event("fault", step=self._last_step, error=text)
        self.close()

    def close(self) -> None:
        """Flush to disk, let dashboards finish for a few seconds, and close; idempotent."""
        if self._is_closed:
            return
        for logger in self._own:
            logger.call("close")
        self._is_closed = True
        self._metrics.close()
        self._events.close()
        for dashboard in self._dashboards:
            dashboard.close()
        self._console.__exit__(None, None, None)


def _start_dashboards(config: TrainConfig, run_directory: Path, *, is_new: bool) -> list[Companion]:
    dashboards = []
    if config.logging.wandb is not WandbMode.disabled:
        if is_new:
            wandb_logger.forget(run_directory)
        dashboards.append(wandb_logger.start_wandb(run_directory, config))
    if config.logging.tensorboard:
        if is_new:
            tensorboard_logger.forget(run_directory)
        dashboards.append(tensorboard_logger.start_tensorboard(run_directory))
    return dashboards


def _sentence(kind: str, fields: dict[str, Any]) -> str | None:
    step = fields.get(names.STEP)
    match kind:
        case "resume":
            changes = [f"changed since the checkpoint: {change}" for change in fields.get("changed", [])]
            return "\n".join([*changes, f"continuing after step {step} from {fields.get('checkpoint')}"])
        case "start" if fields.get("load") == "weights":
            return f"beginning at step 0 with the weights of {fields['checkpoint']}"
        case "validation" | "test":
            return f"{kind} after step {step}: {describe_metrics(fields)}"
        case "checkpoint":
            return f"saved {fields.get('path')}"
        case "profile":
            told = describe_communication(fields)
            return f"profile up to step {step}: {fields['path']}{f'; {told}' if told else ''}"
        case names.SUPERSEDED_EVENT:
            return f"steps {step} to {fields['last_step']} have other numbers than before the run went back"
        case "finished":
            why = fields.get("reason")
            return f"finished after step {step}{f': {why}' if why else ''}"
    return None


def _outcome(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return what identifies a step's result on any machine: data digest, tokens or samples, learning rate, loss."""
    numbers = (number(record, key) for key in (names.unit_of(record), names.LR, names.LOSS))
    return record.get(names.DATA_DIGEST), *numbers


def _agree(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    pairs = zip(before[1:], now[1:], strict=True)
    return before[0] == now[0] and all(
        math.isclose(a, b, rel_tol=_SAME) or not (math.isfinite(a) or math.isfinite(b)) for a, b in pairs
    )


class Logger(Protocol):
    """What ``logging.also`` names: called with the run's directory, on rank 0, in the training process, which waits."""

    def metrics(self, records: list[dict[str, Any]]) -> None:
        """Take the records of the steps since the last call, in order, as they are in ``metrics.jsonl``."""

    def event(self, event: dict[str, Any]) -> None:
        """Take an event, as it is in ``events.jsonl``."""

    def close(self) -> None:
        """Write what is left: the launch ends."""


class OwnLogger:
    """Calls a logger until it raises, which is told once; the run goes on without it."""

    def __init__(self, name: str, directory: Path, tell: Callable[[str, str], None]) -> None:
        """Make the logger ``name``; ``tell`` takes the name and what went wrong."""
        self._name, self._tell = name, tell
        self._logger = self._try(lambda: parts.find(name, "logging.also")(directory))

    def call(self, method: str, *args: Any) -> None:
        if self._logger:
            self._try(lambda: getattr(self._logger, method)(*args))

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            self._logger = None
            self._tell(self._name, parts.told(error))
