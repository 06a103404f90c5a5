"""What the trainer tells: one object takes the facts of a run and hands them to files and displays.

Per run directory: ``metrics.jsonl`` with exactly one object per optimizer step, ``events.jsonl`` with
everything else that happened, ``log/train.log`` with the console's lines. A resumed run writes the steps
after its checkpoint anew, so their old lines are removed; so are the validations and checkpoints after it.
Starts, resumes, stops and faults did happen and stay.
"""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from bigtrain.config import TrainConfig, WandbMode
from bigtrain.schema import to_dict
from bigtrain.telemetry import names, tensorboard_logger, wandb_logger
from bigtrain.telemetry.companion import Companion
from bigtrain.telemetry.console import Console
from bigtrain.telemetry.files import EVENTS_FILE, METRICS_FILE, JsonLines
from bigtrain.telemetry.text import describe_communication
from bigtrain.telemetry.wandb_logger import WandbLogger

if TYPE_CHECKING:  # it imports torch
    from bigtrain.telemetry.gauges import Gauges

LOG_FILE = "log/train.log"

_MAX_ERROR_CHARACTERS = 2000
_REPEATED_EVENTS = ("validation", "checkpoint")
_DURABLE_EVENTS = ("checkpoint", "finished", "stop", "fault")


class NullRecorder:
    """Takes everything and tells nobody: the recorder of all ranks but 0."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def metrics(self, records: list[dict[str, Any]], phases: dict[str, float] | None = None) -> None:
        """Take the records of the steps since the last call, in order, and their mean phases."""

    def event(self, kind: str, **fields: Any) -> None:
        """Take something that happened."""

    def message(self, text: str) -> None:
        """Take a message to the person who trains."""

    def close(self) -> None:
        """Write what is left and close everything."""


class Recorder(NullRecorder):
    """The recorder of rank 0. No method raises because a disk, a terminal or a server fails."""

    def __init__(
        self,
        console: Console,
        metrics_file: JsonLines,
        events_file: JsonLines,
        dashboards: list[Companion],
        gauges: "Gauges | None" = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        """Take the parts; ``console`` is entered already, ``facts`` belong to the events that begin a launch."""
        self._console = console
        self._metrics = metrics_file
        self._events = events_file
        self._dashboards = dashboards
        self._gauges = gauges
        self._facts = facts or {}
        self._is_closed = False

    def metrics(self, records: list[dict[str, Any]], phases: dict[str, float] | None = None) -> None:
        """Write one line per step and show the last step, with the interval's mean step time and throughput.

        Call it before a checkpoint too: what was not written when a run is killed after its checkpoint is missing.

        Args:
            records: Per step ``step, tokens, loss, grad_norm, lr, step_seconds, tokens_per_second`` and more.
            phases: Mean seconds per step of each phase, by their names; the last record gets them and the gauges.
        """
        if not records:
            return
        if self._gauges:
            records = [*records[:-1], records[-1] | self._gauges.read(records, phases or {})]
        for record in records:
            self._metrics.write(record)
        self._metrics.flush()
        self._console.metrics({**records[-1], **_mean_pace(records)})

    def event(self, kind: str, **fields: Any) -> None:
        """Write that ``kind`` (start, resume, validation, checkpoint, stop, finished, fault ...) happened.

        What a person waits for is shown too: resume, validation, checkpoint and finished.

        Args:
            kind: What happened.
            fields: ``step`` and what else belongs to it, such as ``loss``, ``perplexity``, ``path``.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        if kind in names.LAUNCH_EVENTS:
            fields |= self._facts
        event = {"event": kind, **fields, "time": time}
        self._events.write(event)
        self._console.event(event)
        is_durable = kind in _DURABLE_EVENTS
        if is_durable:
            self._metrics.flush(durable=True)
        self._events.flush(durable=is_durable)
        if sentence := _sentence(kind, fields):
            self._console.message(sentence)

    def message(self, text: str) -> None:
        """Show ``text`` above the progress display and keep it in the log file."""
        self._console.message(text)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self.event("fault", error=f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARACTERS])
        self.close()

    def close(self) -> None:
        """Write what is left to the disk, let wandb finish for a few seconds, and close; a second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._metrics.close()
        self._events.close()
        for dashboard in self._dashboards:
            dashboard.close()
        self._console.__exit__(None, None, None)


def build_recorder(
    config: TrainConfig,
    run_directory: Path,
    rank: int,
    resume_step: int,
    make_gauges: "Callable[[], Gauges] | None" = None,
) -> Recorder | NullRecorder:
    """Return rank 0's recorder, or for other ranks one that does nothing.

    Args:
        config: The resolved configuration.
        run_directory: Directory of the run; made if needed.
        rank: Global rank.
        resume_step: Optimizer steps that the loaded checkpoint holds; 0 for a new run.
        make_gauges: What is read at logging steps, if anything; called on rank 0 only.

    Raises:
        OSError: The run directory cannot be written.
    """
    if rank != 0:
        return NullRecorder()
    metrics_file = JsonLines(run_directory / METRICS_FILE)
    num_superseded = metrics_file.truncate_after(resume_step)
    events_file = JsonLines(run_directory / EVENTS_FILE)
    events_file.remove(
        lambda record: (
            record.get("event") in _REPEATED_EVENTS and (record.get(names.STEP, 0) > resume_step or resume_step == 0)
        )
    )
    console = Console(config.train.steps, run_directory / LOG_FILE)
    console.__enter__()
    gauges = make_gauges() if make_gauges else None
    if gauges:
        console.message(gauges.sentence())
    facts = _facts(gauges, num_superseded)
    return Recorder(console, metrics_file, events_file, _dashboards(config, run_directory, resume_step), gauges, facts)


def _facts(gauges: "Gauges | None", num_superseded: int) -> dict[str, Any]:
    """Return what the event that begins a launch tells besides."""
    facts: dict[str, Any] = {"superseded_steps": num_superseded}
    if gauges:
        facts |= {"launched_at": gauges.launched_at, **gauges.describe(), "environment": gauges.environment}
    return facts


def _dashboards(config: TrainConfig, run_directory: Path, resume_step: int) -> list[Companion]:
    dashboards: list[Companion] = []
    if config.logging.wandb is not WandbMode.disabled:
        if resume_step == 0:
            wandb_logger.forget(run_directory)
        settings = config.logging
        name, project, entity = str(config.run.name), settings.wandb_project, settings.wandb_entity
        dashboards.append(WandbLogger(run_directory, name, to_dict(config), settings.wandb, project, entity))
    if config.logging.tensorboard:
        if resume_step == 0:
            tensorboard_logger.forget(run_directory)
        dashboards.append(tensorboard_logger.start_tensorboard(run_directory))
    return dashboards


def _sentence(kind: str, fields: dict[str, Any]) -> str | None:
    step = fields.get(names.STEP)
    match kind:
        case "resume":
            changes = [f"changed since the checkpoint: {change}" for change in fields.get("changed", [])]
            return "\n".join([*changes, f"continuing after step {step} from {fields.get('checkpoint')}"])
        case "validation":
            return f"validation after step {step}: loss {fields['loss']:.4f}, perplexity {fields['perplexity']:.4g}"
        case "checkpoint":
            return f"saved {fields.get('path')}"
        case "profile":
            return "; ".join(
                filter(None, (f"profile up to step {step}: {fields['path']}", describe_communication(fields)))
            )
        case "finished":
            return f"finished after step {step}"
    return None


def _mean_pace(records: list[dict[str, Any]]) -> dict[str, float]:
    seconds = math.fsum(record[names.STEP_SECONDS] for record in records)
    tokens = math.fsum(record[names.STEP_SECONDS] * record[names.TOKENS_PER_SECOND] for record in records)
    return {names.STEP_SECONDS: seconds / len(records), names.TOKENS_PER_SECOND: tokens / max(seconds, 1e-9)}
