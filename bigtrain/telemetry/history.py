"""A run read from its files, for report and live view; without torch."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from bigtrain.config.convert import flatten
from bigtrain.errors import EXIT_FINISHED, EXIT_RESUMABLE, DataError
from bigtrain.files import CONFIG_FILE, read_json
from bigtrain.telemetry import names
from bigtrain.telemetry.files import (
    CLASSIFICATION_FILE,
    EVENTS_FILE,
    IMAGES_FILE,
    METRICS_FILE,
    SAMPLES_FILE,
    only_steps,
    read_jsonl,
)
from bigtrain.telemetry.text import format_duration, number

# See supervise/attempt.py: the holder of a run touches the first every 3 s and leaves the second at its end.
_ATTEMPT_FILE, _EXIT_FILE = "attempt.json", "exit.json"
_SIGN_SECONDS = 10.0


@dataclass(kw_only=True, slots=True)
class History:
    """A run as its files tell it."""

    name: str
    directory: Path
    records: list[dict[str, Any]]  # one per step, in order
    events: list[dict[str, Any]]
    state: str  # when it was read: see :func:`run_state`
    config: dict[str, Any] = field(default_factory=dict)  # the configuration, flat; empty if there is none
    samples: list[dict[str, Any]] = field(default_factory=list)  # generated texts: ``step``, ``prompt``, ``text``
    standing: dict[str, Any] = field(default_factory=dict)  # of the newest checkpoint: the best validation
    classification: dict[str, Any] = field(default_factory=dict)  # ``labels``, ``confusion``, ``wrong``; empty without
    images: list[dict[str, Any]] = field(default_factory=list)  # pictures: ``step``, ``shape``, ``pixels`` in base64
    unigram_loss: float | None = None  # validation loss of a model that knows only the frequency of each token

    def series(self, key: str) -> tuple[list[dict[str, Any]], list[float]]:
        """Return the records that have ``key`` and its values; non-finite ones are NaN."""
        having = [record for record in self.records if key in record]
        return having, [number(record, key) for record in having]

    def family(self, prefix: str) -> list[str]:
        """Return the metrics ``<prefix>/<name>`` in order of appearance."""
        return list(dict.fromkeys(key for record in self.records for key in record if key.startswith(f"{prefix}/")))

    def events_of(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("event") in kinds]

    def launches(self) -> list[dict[str, Any]]:
        return self.events_of(*names.LAUNCH_EVENTS)

    def train_seconds(self) -> float:
        return math.fsum(self.series(names.STEP_SECONDS)[1])

    def held_seconds(self) -> float | None:
        """Return the time of all launches from process start to their last record; None if it is not known."""
        begins = [launch.get("launched_at") for launch in self.launches()]
        if not begins or None in begins:
            return None
        times = [written for item in (*self.records, *self.events) if (written := _unix_time(item)) is not None]
        held = 0.0
        for begin, end in zip(begins, [*begins[1:], math.inf], strict=True):
            held += max((written for written in times if begin <= written < end), default=begin) - begin
        return held


def read_history(directory: Path) -> History:
    """Read a run, which may be growing; without a step it is a DataError."""
    # The state first: a run that has ended writes nothing more.
    events = read_jsonl(directory / EVENTS_FILE)
    state = run_state(directory, events, max(time.time() - last_sign(directory), 0.0))
    records = only_steps(read_jsonl(directory / METRICS_FILE))
    if not records:
        raise DataError(f"{directory}: no step is finished yet: {METRICS_FILE} has none")
    return History(
        name=directory.resolve().name,
        directory=directory,
        records=records,
        events=read_jsonl(directory / EVENTS_FILE),
        state=state,
        config=read_flat_config(directory),
        samples=read_jsonl(directory / SAMPLES_FILE),
        standing=_best_validation(directory),
        classification=read_json(directory / CLASSIFICATION_FILE),
        images=read_json(directory / IMAGES_FILE).get("pictures", []),
        # From the index that a run keeps beside its tokenizer.
        unigram_loss=read_json(directory / "index.json").get("validation", {}).get("unigram_nats_per_token") or None,
    )


def _best_validation(directory: Path) -> dict[str, Any]:
    """Return ``metric``, ``best`` and ``best_step`` as the newest checkpoint has them; empty if there is none."""
    states = sorted(directory.glob("checkpoints/step-*[0-9]/run_state.json"))
    standing = (read_json(states[-1]).get("standing") if states else None) or {}
    return standing if isinstance(standing.get("best"), float) else {}


def read_flat_config(directory: Path) -> dict[str, Any]:
    """Return the configuration as ``section.key: value``; empty if it cannot be read."""
    try:
        config = yaml.safe_load((directory / CONFIG_FILE).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return flatten(config) if isinstance(config, dict) else {}


def differences(histories: list[History]) -> list[tuple[str, list[Any]]]:
    """Return the settings, but for ``run.name``, in which runs differ, with the value in each."""
    keys = sorted({key for history in histories for key in history.config})
    rows = [(key, [history.config.get(key) for history in histories]) for key in keys if key != "run.name"]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _unix_time(record: dict[str, Any]) -> float | None:
    try:
        return datetime.fromisoformat(record[names.TIME]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None


def how_ended(directory: Path, events: Sequence[dict[str, Any]]) -> str | None:
    """Return how the newest launch ended: ``finished``, ``stopped``, ``failed: <why>``, or None."""
    if told := read_json(directory / _EXIT_FILE):
        ends = {EXIT_FINISHED: "finished", EXIT_RESUMABLE: "stopped"}
        return ends.get(told.get("code"), f"failed: {told.get('reason')}")
    if events and not (directory / _ATTEMPT_FILE).exists():  # a copy of the visible files only
        return {"finished": "finished", "stop": "stopped"}.get(events[-1].get("event", ""))
    return None


def run_state(directory: Path, events: Sequence[dict[str, Any]], silent_seconds: float) -> str:
    """Return :func:`how_ended`, else ``running`` or ``no sign of life for <time>``."""
    if end := how_ended(directory, events):
        return end
    return "running" if silent_seconds < _SIGN_SECONDS else f"no sign of life for {format_duration(silent_seconds)}"


def last_sign(directory: Path) -> float:
    """Return the time of the last sign of life by the clock of the run's file system; 0 if there is none."""
    times = [0.0]
    for name in (_ATTEMPT_FILE, METRICS_FILE, EVENTS_FILE):
        try:
            with (directory / name).open("rb") as file:  # opening makes a network file system ask its server
                times.append(os.fstat(file.fileno()).st_mtime)
        except OSError:
            continue
    return max(times)
