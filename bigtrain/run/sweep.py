"""Sweeps: trials are ordinary runs, launched as processes, and continued from rung to rung.

What a sweep knows is in the runs themselves; its own file ``sweep.json`` says which trials there are. The learning rate
of a trial follows from ``train.steps``, the last rung, from the first step on: a trial that is continued is the run that
was never interrupted.
"""

import contextlib
import itertools
import json
import math
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from bigtrain.checkpoint.store import newest_step
from bigtrain.config.sweep import Axis, Sampler, SweepSettings
from bigtrain.errors import EXIT_FINISHED, EXIT_NO_RESTART, EXIT_RESUMABLE, ConfigError, StopError
from bigtrain.files import read_json, write_anew
from bigtrain.log import get_logger
from bigtrain.processes import STOP_SIGNALS
from bigtrain.supervise.attempt import read_exit
from bigtrain.supervise.signals import STOP_WITH_PARENT
from bigtrain.telemetry.figures import parallel_figure
from bigtrain.telemetry.files import EVENTS_FILE, METRICS_FILE, read_jsonl
from bigtrain.telemetry.history import read_history
from bigtrain.telemetry.names import STEP, unit_of
from bigtrain.telemetry.report import Section, render

STATE_FILE, LOG_FILE = "sweep.json", "sweep.log"
_NAME_CHARACTERS = 64
_SHOWN_TRIALS = 4  # with their curves

Settings = dict[str, str]  # value as typed, by the key of the axis


@dataclass(slots=True)
class Trial:
    """One of the runs of a sweep."""

    name: str
    settings: Settings
    value: float = math.nan  # of the metric at the rung that it has reached
    steps: int = 0  # that rung
    failure: str = ""

    @property
    def typed(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.settings.items()]


@dataclass(slots=True)
class Sweep:
    """The sweep of a training command."""

    directory: Path
    training: list[str]  # settings that all trials share, as typed
    axes: list[Axis]
    settings: SweepSettings
    metric: str
    less_is_better: bool
    rungs: list[int]  # steps after which trials are compared; the last is ``train.steps``, 0 if only the data says it
    trials: list[Trial] = field(default_factory=list)

    def best_first(self) -> list[Trial]:
        """Return the trials by the last rung that they have reached, and their values there; failures are last."""
        sign = 1 if self.less_is_better else -1
        measured = [trial for trial in self.trials if not math.isnan(trial.value)]
        others = [trial for trial in self.trials if math.isnan(trial.value)]
        return sorted(measured, key=lambda t: (-t.steps, sign * t.value, t.name)) + others

    @property
    def num_trials(self) -> int:
        is_grid = self.settings.sampler is Sampler.grid
        return math.prod(len(axis.values) for axis in self.axes) if is_grid else self.settings.trials

    def command(self, trial: Trial) -> str:
        return shlex.join(["bigtrain", "train", *self.training, *trial.typed])


def rungs_of(steps: int, num_trials: int, settings: SweepSettings, every_steps: int) -> list[int]:
    """Return the steps after which trials are compared: ``steps`` divided by powers of ``halving``, at validations.

    ConfigError: two of them would be the same.
    """
    if not settings.halving:
        return [steps]
    most = max(math.ceil(math.log(num_trials, settings.halving) - 1e-9), 1)
    exact = [steps / settings.halving**power for power in range(most, 0, -1)]
    exact = [max(rung, settings.first_steps or 0) for rung in exact]
    found = [*dict.fromkeys(every_steps * math.ceil(rung / every_steps - 1e-9) for rung in exact), steps]
    if (not settings.first_steps and len(found) <= most) or found[-2] >= steps:
        least = exact[0]
        raise ConfigError(
            f"validation.every_steps={every_steps}: the rungs of sweep.halving={settings.halving} are at validations, the "
            f"first after about {least:.0f} of train.steps={steps}; validate at least as often, or set sweep.first_steps"
        )
    return found


def grid(axes: Sequence[Axis]) -> list[Settings]:
    """Return every combination of the values of the axes."""
    keys = [axis.key for axis in axes]
    return [dict(zip(keys, point, strict=True)) for point in itertools.product(*(axis.values for axis in axes))]


def drawn(axes: Sequence[Axis], seed: int, number: int) -> Settings:
    """Return the settings of a trial of a random search, a function of the seed and its number."""
    shares = np.random.default_rng((seed, number)).random(len(axes))
    return {axis.key: axis.at(float(share)) for axis, share in zip(axes, shares, strict=True)}


def learnt(axes: Sequence[Axis], seed: int, told: Sequence[Trial], *, less_is_better: bool) -> Settings:
    """Return the settings that Optuna's TPE (Bergstra et al., 2011) tries after some trials, of which some may run yet."""
    import optuna
    from optuna.trial import TrialState, create_trial

    spaces: dict[str, Any] = {}
    for axis in axes:
        if axis.values:
            spaces[axis.key] = optuna.distributions.CategoricalDistribution(axis.values)
        elif axis.is_whole:
            spaces[axis.key] = optuna.distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.is_log)
        else:
            spaces[axis.key] = optuna.distributions.FloatDistribution(axis.low, axis.high, log=axis.is_log)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed + len(told))
    study = optuna.create_study(sampler=sampler, direction="minimize" if less_is_better else "maximize")
    for trial in told:
        params: dict[str, Any] = {
            axis.key: value if axis.values else int(value) if axis.is_whole else float(value)
            for axis, value in zip(axes, trial.settings.values(), strict=True)
        }
        is_known = not math.isnan(trial.value)
        state, value = (TrialState.COMPLETE, trial.value) if is_known else (TrialState.FAIL, None)
        study.add_trial(create_trial(state=state, value=value, params=params, distributions=spaces))
    found = study.ask(spaces).params
    return {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in found.items()}


def named(number: int, settings: Mapping[str, str]) -> str:
    """Return the name of a trial's run: its number and, for people, its settings."""
    said = "-".join(f"{key.lstrip('+').rpartition('.')[2]}_{value}" for key, value in settings.items())
    return f"{number:03d}-{re.sub(r'[^A-Za-z0-9._-]+', '_', said)}"[:_NAME_CHARACTERS].rstrip("._-")


def measure(sweep: Sweep, trial: Trial, steps: int) -> bool:
    """Read how a trial stands at a rung, 0 for its end; return whether there is nothing to launch for that."""
    directory = sweep.directory / trial.name
    ended, reached = read_exit(directory), newest_step(directory)
    is_over = ended.get("code") in (EXIT_FINISHED, EXIT_NO_RESTART)
    events = read_jsonl(directory / EVENTS_FILE)
    values = [
        (event["step"], event.get(sweep.metric))
        for event in events
        if event.get("event") == "validation" and event["step"] <= (steps or math.inf)
    ]
    step, value = values[-1] if values else (0, None)
    trial.value = math.nan if value is None else value
    trial.steps = max(step, steps if is_over else 0)
    trial.failure = str(ended.get("reason")) if ended.get("code") == EXIT_NO_RESTART else ""
    return is_over or (bool(steps) and reached >= steps and step == steps)


def run_sweep(sweep: Sweep, launch: Callable[[Trial, int], int], *, parallel: int, report: Callable[[], None]) -> None:
    """Run all trials to their last rungs, ``parallel`` at once; what is done already is not done again.

    ``launch`` runs a trial, for so many steps or with 0 to its end, and returns the exit code of its process; ``report``
    is called after each rung. StopError: trials were stopped before they were done.
    """
    alive, total = _proposed(sweep), sweep.num_trials
    for number, steps in enumerate(sweep.rungs):
        is_last = number == len(sweep.rungs) - 1
        done, stopped = list[Trial](), 0
        with ThreadPoolExecutor(parallel) as pool:
            running = set[Future[Trial]]()
            while True:
                while len(running) < parallel and not stopped and (trial := next(alive, None)):
                    running.add(pool.submit(_advance, sweep, trial, steps, launch, is_last=is_last))
                if not running:
                    break
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    done.append(trial := future.result())
                    is_there = trial.failure or measure(sweep, trial, steps)
                    stopped += not is_there
                    _say(sweep, trial, f"{len(done)} of {total}")
        report()
        if stopped:
            raise StopError(f"{sweep.directory} is stopped before its end; the same command continues")
        whole = [trial for trial in sweep.best_first() if trial in done and not math.isnan(trial.value)]
        total = math.ceil(len(done) / (sweep.settings.halving or 1))
        alive = iter(whole[:total])


def _advance(sweep: Sweep, trial: Trial, steps: int, launch: Callable[[Trial, int], int], *, is_last: bool) -> Trial:
    """Bring a trial to a rung; a failure is recorded in it, and the others go on."""
    if measure(sweep, trial, steps):
        return trial
    directory = sweep.directory / trial.name
    code = launch(trial, 0 if is_last else steps - newest_step(directory))
    if measure(sweep, trial, steps) or code in (EXIT_FINISHED, EXIT_RESUMABLE):  # or stopped
        return trial
    ended, log = read_exit(directory), directory / LOG_FILE
    last = log.read_text(errors="replace").strip().splitlines()[-1:] if log.exists() else []
    is_told = ended.get("code") not in (None, EXIT_FINISHED, EXIT_RESUMABLE)  # by this launch, not one before
    trial.failure = str(ended["reason"]) if is_told else next(iter(last), f"exit code {code}")
    trial.value = math.nan
    return trial


def _proposed(sweep: Sweep) -> Iterator[Trial]:
    """Yield the trials of the sweep, those on record first; new ones are recorded before they begin."""
    settings = sweep.settings
    yield from list(sweep.trials)
    points = grid(sweep.axes) if settings.sampler is Sampler.grid else []
    while (number := len(sweep.trials)) < sweep.num_trials:
        if points:
            point = points[number]
        elif settings.sampler is Sampler.random:
            point = drawn(sweep.axes, settings.seed, number)
        else:
            point = learnt(sweep.axes, settings.seed, sweep.trials, less_is_better=sweep.less_is_better)
        sweep.trials.append(Trial(named(number, point), point))
        write_state(sweep)
        yield sweep.trials[-1]


def request_of(sweep: Sweep) -> dict[str, Any]:
    """Return what decides which trials there are, and their numbers."""
    axes = [f"{a.key}={list(a.values) or [a.low, a.high, 'log' * a.is_log]}" for a in sweep.axes]
    settings = sweep.settings
    return {"training": sweep.training, "axes": axes, "sampler": settings.sampler.name, "seed": settings.seed}


def write_state(sweep: Sweep) -> None:
    sweep.directory.mkdir(parents=True, exist_ok=True)
    trials = [{"name": trial.name, "settings": trial.settings} for trial in sweep.trials]
    write_anew(sweep.directory / STATE_FILE, json.dumps({**request_of(sweep), "trials": trials}, indent=1) + "\n")


def read_state(sweep: Sweep) -> None:
    """Take up the trials of a sweep that is there; ConfigError if it is another one."""
    found = read_json(sweep.directory / STATE_FILE)
    if changed := [key for key, value in request_of(sweep).items() if found and found.get(key) != value]:
        problem = f"{sweep.directory} is a sweep with another {' and '.join(changed)}"
        raise ConfigError(f"{problem}; choose another sweep.name, or give the command that it was begun with")
    sweep.trials = [Trial(trial["name"], trial["settings"]) for trial in found.get("trials", [])]
    for trial in sweep.trials:
        measure(sweep, trial, sweep.rungs[0])


def samples_of(sweep: Sweep) -> tuple[int, float]:
    """Return the samples, or tokens, that the trials have trained on, and those of all trials to the end."""
    records = [read_jsonl(sweep.directory / trial.name / METRICS_FILE) for trial in sweep.trials]
    last = [(found[-1][unit_of(found[-1])], found[-1][STEP]) for found in records if found]
    return sum(count for count, _ in last), sum(count * max(sweep.rungs[-1] / step, 1) for count, step in last)


def page_of(sweep: Sweep) -> str:
    """Return the page of a sweep as HTML: the ranking, parallel coordinates, and the report of its best trials."""
    ranked, keys = sweep.best_first(), [axis.key for axis in sweep.axes]
    columns = [*(axis.name for axis in sweep.axes), sweep.metric]
    measured = [trial for trial in ranked if not math.isnan(trial.value)]
    rows = []
    for place, trial in enumerate(ranked, 1):
        result = trial.failure or ("" if math.isnan(trial.value) else f"{trial.value:.5g}")
        rows.append([str(place), *(trial.settings[key] for key in keys), result, str(trial.steps), trial.name])
    lines: list[list[str | float]] = [[*(trial.settings[key] for key in keys), trial.value] for trial in measured]

    def draw() -> dict[str, Any]:
        caption = "A line a trial: its settings, and what it reached at its last rung; the best one is thick."
        return {caption: parallel_figure(columns, lines, log=[a.is_log for a in sweep.axes])} if lines else {}

    ranking = Section(
        "Trials, the best one first",
        command=sweep.command(measured[0]) if measured else "",
        table=(["", *columns, "step", "run"], rows),
        draw=draw,
    )
    histories = [read_history(sweep.directory / trial.name) for trial in measured[:_SHOWN_TRIALS]]
    return render(histories, title=f"Sweep {sweep.directory.name}", ahead=[ranking])


def _say(sweep: Sweep, trial: Trial, progress: str) -> None:
    best = sweep.best_first()[0]
    result = f"{sweep.metric} {trial.value:.5g} after step {trial.steps}; best {best.value:.5g} of {best.name}"
    get_logger().info(f"{progress}: {trial.name}: {f'failed: {trial.failure}' if trial.failure else result}")


@dataclass(slots=True)
class Launcher:
    """Starts trials as processes of ``bigtrain train``, each in its place; stops them all when this process is told to."""

    sweep: Sweep
    imports: list[str]  # what ``--import`` has named
    places: list[dict[str, str]]  # environment variables of each place, in which one trial runs at a time
    _free: "queue.Queue[dict[str, str]]" = field(default_factory=queue.Queue)
    _running: set[Any] = field(default_factory=set)
    _is_stopping: bool = False

    def __enter__(self) -> "Launcher":
        for place in self.places:
            self._free.put(place)
        for number in STOP_SIGNALS:
            signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._is_stopping = True
        for process in list(self._running):
            with contextlib.suppress(OSError):
                process.terminate()

    def __call__(self, trial: Trial, steps: int) -> int:
        """Run a trial and return its exit code; its output goes to its ``sweep.log``."""
        directory, place = self.sweep.directory / trial.name, self._free.get()
        front = shlex.split(self.sweep.settings.launcher or f"{shlex.quote(sys.executable)} -m")
        own = [f"run.root={self.sweep.directory}", f"run.name={trial.name}"]
        own += [f"run.stop_after_steps={steps}"] if steps else []
        command = [*front, "bigtrain", "train", *self.imports, *self.sweep.training, *trial.typed, *own]
        directory.mkdir(parents=True, exist_ok=True)
        process, environ = None, {**os.environ, **place, STOP_WITH_PARENT: "1"}
        try:
            with (directory / LOG_FILE).open("ab") as log:
                if self._is_stopping:
                    return EXIT_RESUMABLE
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ)
                self._running.add(process)
                if self._is_stopping:  # since it was looked at
                    process.terminate()
                return process.wait()
        except OSError as error:
            raise ConfigError(f"sweep.launcher={front[0]}: cannot be started: {error}") from error
        finally:
            self._running.discard(process)
            self._free.put(place)
