"""A run as its files tell it, for those who look at it from outside: report and live view. No torch."""

import json
import math
import statistics
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from bigtrain.errors import BigtrainError, DataError
from bigtrain.schema import flatten
from bigtrain.telemetry import names
from bigtrain.telemetry.files import EVENTS_FILE, METRICS_FILE, SAMPLES_FILE, only_steps, read_jsonl
from bigtrain.telemetry.text import number

CONFIG_FILE = "config.yaml"
QUIET_EVENTS = ("start", "validation", "checkpoint", "finished")
"""What belongs to an undisturbed run; everything else that happens is worth a mark."""


@dataclass(kw_only=True, slots=True)
class History:
    """What is known of a run."""

    name: str
    directory: Path
    records: list[dict[str, Any]]
    """One per step, in order."""
    events: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    """The configuration, flat; empty if there is none."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """Generated texts: ``step``, ``prompt``, ``text``."""
    unigram_loss: float | None = None
    """Validation loss of a model that knows only the frequency of each token."""

    def series(self, key: str) -> tuple[list[dict[str, Any]], list[float]]:
        """Return the records that have ``key``, and its values; what is not finite is not a number."""
        having = [record for record in self.records if key in record]
        return having, [number(record, key) for record in having]

    def validations(self) -> list[dict[str, Any]]:
        """Return the validations, in order."""
        return [event for event in self.events if event.get("event") == "validation"]

    def disturbances(self) -> list[dict[str, Any]]:
        """Return the events that are worth a mark on a curve."""
        return [event for event in self.events if event.get("event") not in QUIET_EVENTS]

    def launches(self) -> list[dict[str, Any]]:
        """Return the events that began a launch."""
        return [event for event in self.events if event.get("event") in names.LAUNCH_EVENTS]


def read_history(directory: Path) -> History:
    """Read a run from its files, which may be growing.

    Raises:
        DataError: There are no metrics.
    """
    records = only_steps(_read(directory / METRICS_FILE))
    if not records:
        raise DataError(
            f"{directory}: no {METRICS_FILE} with steps in it; name the directory of a run, such as runs/gpt_nano"
        )
    return History(
        name=directory.resolve().name,
        directory=directory,
        records=records,
        events=_read(directory / EVENTS_FILE),
        config=read_flat_config(directory),
        samples=_read(directory / SAMPLES_FILE),
        unigram_loss=_unigram_loss(directory),
    )


def read_flat_config(directory: Path) -> dict[str, Any]:
    """Return the configuration of a run as ``section.key: value``; empty if it cannot be read."""
    try:
        config = yaml.safe_load((directory / CONFIG_FILE).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return flatten(config) if isinstance(config, dict) else {}


def _read(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.exists() else []


def _unigram_loss(directory: Path) -> float | None:
    """Return the number from the index that a run keeps beside its tokenizer."""
    try:
        return json.loads((directory / "index.json").read_text())["validation"]["unigram_nats_per_token"] or None
    except (OSError, ValueError, KeyError, TypeError, BigtrainError):
        return None


def differences(histories: list[History]) -> list[tuple[str, list[Any]]]:
    """Return the settings in which runs differ, with the value in each; a run's own name is none."""
    keys = sorted({key for history in histories for key in history.config})
    rows = [(key, [history.config.get(key) for history in histories]) for key in keys if key != "run.name"]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """A run in a few numbers; None where the files do not tell."""

    step: int
    num_steps: int | None
    tokens: int
    loss: float
    validation_loss: float | None
    tokens_per_second: float
    mfu: float | None
    train_seconds: float
    held_seconds: float | None
    """Wall-clock time of all launches, from the starts of their processes."""
    goodput: float | None
    """Share of ``held_seconds`` that went into steps which are still part of the run."""
    num_launches: int
    state: str
    """``finished``, ``stopped``, ``running`` or ``ended``: see :func:`run_state`."""


def totals(history: History, now: float) -> Totals:
    """Return the run in a few numbers; ``now`` is the Unix time."""
    last, seconds = (
        history.records[-1],
        [record[names.STEP_SECONDS] for record in history.records if names.STEP_SECONDS in record],
    )
    validations, train_seconds = history.validations(), math.fsum(seconds)
    held = _held_seconds(history)
    rates = [record[names.TOKENS_PER_SECOND] for record in history.records if names.TOKENS_PER_SECOND in record]
    _, mfu = history.series(names.MFU_CAUSAL)
    return Totals(
        step=last[names.STEP],
        num_steps=history.config.get("train.steps"),
        tokens=last.get(names.TOKENS, 0),
        loss=number(last, names.LOSS),
        validation_loss=validations[-1].get(names.LOSS) if validations else None,
        tokens_per_second=statistics.median(rates) if rates else math.nan,
        mfu=statistics.median(mfu) if mfu else None,
        train_seconds=train_seconds,
        held_seconds=held,
        goodput=min(train_seconds / held, 1.0) if held else None,
        num_launches=len(history.launches()),
        state=_state(history, now),
    )


def unix_time(record: dict[str, Any]) -> float | None:
    """Return when a record or an event was written."""
    try:
        return datetime.fromisoformat(record[names.TIME]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None


def _held_seconds(history: History) -> float | None:
    """Return the time of all launches; one that was killed ended when it last wrote."""
    launches = [launch.get("launched_at") for launch in history.launches()]
    if not launches or None in launches:
        return None
    times = sorted(t for item in (*history.records, *history.events) if (t := unix_time(item)) is not None)
    ends = [*launches[1:], math.inf]
    held = 0.0
    for begin, end in zip(launches, ends, strict=True):
        held += max((t for t in times if begin <= t < end), default=begin) - begin
    return held


_SILENT_INTERVALS = 20
_SILENT_SECONDS = 120.0


def run_state(last_event: str | None, written_at: float, interval_seconds: float, now: float) -> str:
    """Return ``finished``, ``stopped``, ``running`` or ``ended``.

    Args:
        last_event: What happened last.
        written_at: Unix time at which the run wrote last; who is silent for long has ended.
        interval_seconds: Time between two writings.
        now: Unix time.
    """
    if last_event in ("finished", "stop"):
        return {"finished": "finished", "stop": "stopped"}[last_event]
    return "running" if now - written_at < max(_SILENT_SECONDS, _SILENT_INTERVALS * interval_seconds) else "ended"


def _state(history: History, now: float) -> str:
    last = history.events[-1].get("event") if history.events else None
    times = [t for item in (*history.records[-1000:], *history.events[-10:]) if (t := unix_time(item)) is not None]
    interval = history.records[-1].get(names.STEP_SECONDS, 1.0) * history.config.get("train.log_every_steps", 10)
    return run_state(last, max(times, default=0.0), interval, now)
