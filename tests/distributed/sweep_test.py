"""Sweeps: rungs continue runs exactly, a killed sweep goes on, and the trials are what their command says."""

import json
import math
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigtrain.cli import sweep as command
from bigtrain.config.sweep import Axis, SweepSettings
from bigtrain.errors import ConfigError, StopError
from bigtrain.run import sweep as sweeps
from tests.distributed.launches import SMALL, Launch, events, fork, launch, trajectory

RATES = "optimizer.lr=1e-2,3e-2,1e-4,1e-3"
ARGS = [
    *(arg for arg in SMALL if not arg.startswith("optimizer.lr")),
    "validation.every_steps=2",
    "validation.batches=1",
    "checkpoint.every_steps=0",
]


def begun(directory: Path, *args: str) -> sweeps.Sweep:
    config, training, axes = command.read([*ARGS, f"run.root={directory}", *args])
    return command.begin(config, training, axes)


def forked(sweep: sweeps.Sweep, cwd: Path, calls: list[tuple[str, int]]) -> Callable[[sweeps.Trial, int], int]:
    """Return how trials are launched, by ranks that need no imports."""

    def run(trial: sweeps.Trial, steps: int) -> int:
        calls.append((trial.name, steps))
        own = [
            f"run.root={sweep.directory}",
            f"run.name={trial.name}",
            *([f"run.stop_after_steps={steps}"] if steps else []),
        ]
        result = fork("train.py", *sweep.training, *trial.typed, *own, cwd=cwd)
        assert result.code in (0, 75), result.err
        return result.code

    return run


def test_halving_continues_runs_exactly_and_a_stopped_sweep_goes_on(tmp_path: Path):
    sweep, calls = begun(tmp_path, RATES, "sweep.halving=2"), list[tuple[str, int]]()
    assert sweep.rungs == [2, 4, 8]
    run = forked(sweep, tmp_path, calls)

    def stopping(trial: sweeps.Trial, steps: int) -> int:
        return 75 if len(calls) == 5 else run(trial, steps)

    with pytest.raises(StopError, match="the same command continues"):
        sweeps.run_sweep(sweep, stopping, parallel=1, report=lambda: None)
    again = begun(tmp_path, RATES, "sweep.halving=2")
    sweeps.run_sweep(again, forked(again, tmp_path, calls), parallel=1, report=lambda: command.write_page(again))

    assert [steps for _, steps in calls] == [2, 2, 2, 2, 2, 2, 0], "nothing is trained twice"
    best, second, *others = again.best_first()
    assert (best.steps, second.steps, {trial.steps for trial in others}) == (8, 4, {2})
    assert calls[-1][0] == best.name
    assert [trial.name[:3] for trial in again.best_first()][:2] == ["001", "000"], (
        "the larger rates learn more in 8 steps"
    )

    whole = [*ARGS, *best.typed, f"run.root={tmp_path}", "run.name=whole"]
    assert fork("train.py", *whole, cwd=tmp_path).code == 0
    assert trajectory(tmp_path / "whole") == trajectory(again.directory / best.name)
    kinds = [event["loss"] for event in events(tmp_path / "whole", "validation")]
    assert [event["loss"] for event in events(again.directory / best.name, "validation")] == kinds
    other = [*ARGS, *best.typed, f"run.root={tmp_path}", "run.name=other", "train.steps=4"]
    assert fork("train.py", *other, cwd=tmp_path).code == 0
    assert trajectory(tmp_path / "other") != trajectory(again.directory / best.name)[:4], (
        "a rung is no run of its length"
    )

    done, all_whole = sweeps.samples_of(again)
    assert (done, all_whole) == (8 * 16 * (4 * 2 + 2 * 2 + 4), 8 * 16 * 4 * 8)
    page = (again.directory / "sweep.html").read_text()
    assert "optimizer.lr=0.03" in page and "A line a trial" in page and best.name in page
    with pytest.raises(ConfigError, match="is a sweep with another axes; choose another"):
        begun(tmp_path, "optimizer.lr=1e-2,3e-2", "sweep.halving=2")


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path: Path):
    args = [*ARGS, "train.steps=300", "validation.every_steps=50", "optimizer.lr=1e-2,3e-2,1e-3", "sweep.parallel=2"]
    bigtrain = [sys.executable, "-m", "bigtrain", "sweep", *args]
    first = tmp_path / "runs/sweep/000-lr_0.01"
    with Launch(bigtrain, tmp_path) as running:
        running.wait_until(lambda: (first / "metrics.jsonl").exists() and len(trajectory(first)) > 20)
        running.process.send_signal(signal.SIGKILL)
        running.process.wait()
        deadline = time.monotonic() + 60
        while not (first / "exit.json").exists():  # its runs are told to stop, and save
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert json.loads((first / "exit.json").read_text())["code"] == 75
    result = launch(bigtrain, tmp_path)
    assert result.code == 0, result.err
    assert len(trajectory(first)) == 300
    assert len(events(first, "resume")) == 1
    best = re.search(r"best: bigtrain train .*optimizer.lr=(\S+)", result.out)
    assert best and best[1] == "0.03"
    assert launch(bigtrain, tmp_path).out == result.out


def test_a_trial_that_fails_is_named_and_the_others_go_on(tmp_path: Path):
    sweep = begun(tmp_path, "optimizer.lr=1e-2,1e-3")
    run = forked(sweep, tmp_path, [])
    sweeps.run_sweep(
        sweep, lambda t, steps: 1 if t.name[0:3] == "000" else run(t, steps), parallel=1, report=lambda: None
    )
    assert [(t.name, t.failure) for t in sweep.best_first()] == [("001-lr_0.001", ""), ("000-lr_0.01", "exit code 1")]


def test_the_process_of_a_trial_is_an_ordinary_launch(tmp_path: Path):
    sweep = begun(
        tmp_path, "optimizer.lr=1e-2,1e-3", "sweep.launcher=sh -c 'echo $PLACE $BIGTRAIN_STOP_WITH_PARENT $*' sh"
    )
    trial = sweeps.Trial("000", {"optimizer.lr": "1e-2"})
    with sweeps.Launcher(sweep, ["--import=./ideas.py"], [{"PLACE": "7"}]) as start:
        assert start(trial, 3) == 0
    said = (sweep.directory / "000/sweep.log").read_text().split()
    assert said[:5] == ["7", "1", "bigtrain", "train", "--import=./ideas.py"]
    assert said[-4:] == ["optimizer.lr=1e-2", f"run.root={sweep.directory}", "run.name=000", "run.stop_after_steps=3"]


@pytest.mark.parametrize(
    ("arg", "expected"),
    [
        ("optimizer.lr=1e-3,2e-3", Axis("optimizer.lr", ("0.001", "0.002"))),
        ("+model=choice(mlp_digits,cnn_digits)", Axis("+model", ("mlp_digits", "cnn_digits"))),
        ("optimizer.betas=[0.9,0.9],[0.8,0.9]", Axis("optimizer.betas", ("[0.9,0.9]", "[0.8,0.9]"))),
        ("train.seed=range(0,6,2)", Axis("train.seed", ("0", "2", "4"))),
        ("data.path=choice('a b',c)", Axis("data.path", ("'a b'", "c"))),
        ("data.path=a,b", None),
        ("optimizer.betas=[0.9,0.9]", None),
        ("train.global_batch_size=interval(8,64)", Axis("train.global_batch_size", low=8, high=64, is_whole=True)),
        ("optimizer.lr=tag(log,interval(1e-4,1e-2))", Axis("optimizer.lr", low=1e-4, high=1e-2, is_log=True)),
    ],
)
def test_values_are_written_as_hydra_writes_them(arg: str, expected: Axis | None):
    assert command.axis_of(arg) == expected


MISTAKES: dict[str, list[str]] = {
    "a sweep needs several values of a setting": [],
    "optimizer.lr: given twice": ["optimizer.lr=1,2", "optimizer.lr=3,4"],
    "sweep.parallel=1,2: one value, please": ["sweep.parallel=1,2"],
    "optimizer.lr: a grid needs values": ["optimizer.lr=interval(1e-3,1e-2)"],
    "the first number must be less than the second and more than 0": ["optimizer.lr=tag(log,interval(0,1))"],
    "a grid of 90,000 trials": ["optimizer.lr=range(1,301)", "train.seed=range(0,300)"],
    "random would draw 2 combinations 16 times": ["optimizer.lr=1,2", "sweep.sampler=random"],
    "model.num_heads=5: .*does not divide by model.num_heads=5": ["model.num_heads=3,5"],
    "validation.every_steps=0: trials are compared": ["optimizer.lr=1,2", "validation.every_steps=0"],
    "the first after about 2 of train.steps=8": ["optimizer.lr=1,2,3,4", "validation.every_steps=8", "sweep.halving=2"],
    "rungs are shares of one train.steps": ["train.steps=8,16", "sweep.halving=2"],
    "sweep.sampler=tpe learns from finished trials": ["optimizer.lr=1,2", "sweep.sampler=tpe", "sweep.halving=2"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_sentences(message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        begun(tmp_path, *MISTAKES[message])
    assert list(tmp_path.iterdir()) == []


def test_rungs_are_validations_and_the_last_one_is_the_end():
    halving = SweepSettings(halving=2)
    assert sweeps.rungs_of(2000, 16, halving, 125) == [125, 250, 500, 1000, 2000]
    assert sweeps.rungs_of(2000, 16, SweepSettings(halving=4), 100) == [200, 500, 2000]
    assert sweeps.rungs_of(2000, 16, SweepSettings(halving=4, first_steps=400), 100) == [400, 500, 2000]
    assert sweeps.rungs_of(2000, 3, halving, 500) == [500, 1000, 2000]
    assert sweeps.rungs_of(2000, 16, SweepSettings(), 500) == [2000]


def test_random_trials_are_functions_of_seed_and_number():
    axes = [Axis("a", low=1e-4, high=1e-2, is_log=True), Axis("b", low=1, high=3, is_whole=True), Axis("c", ("x", "y"))]
    points = [sweeps.drawn(axes, 0, number) for number in range(200)]
    assert points[7] == sweeps.drawn(axes, 0, 7) != sweeps.drawn(axes, 1, 7)
    assert {point["b"] for point in points} == {"1", "2", "3"} and {point["c"] for point in points} == {"x", "y"}
    assert 0.4 < sum(float(point["a"]) < 1e-3 for point in points) / 200 < 0.6, (
        "half of them below the middle of the scale"
    )
    assert len(sweeps.grid([Axis("a", ("1", "2")), Axis("b", ("3", "4", "5"))])) == 6


def test_tpe_learns_from_what_it_is_told():
    pytest.importorskip("optuna")
    axes = [Axis("lr", low=1e-5, high=1.0, is_log=True), Axis("kind", ("a", "b"))]

    def loss(settings: dict[str, str]) -> float:
        return (math.log10(float(settings["lr"])) + 2) ** 2 + (settings["kind"] == "b")

    def search(sampler: Any) -> list[float]:
        told: list[sweeps.Trial] = []
        for _ in range(40):
            settings = sampler(told)
            told.append(sweeps.Trial(str(len(told)), settings, loss(settings), 1))
        return [trial.value for trial in told[20:]]

    learnt = search(lambda told: sweeps.learnt(axes, 0, told, less_is_better=True))
    by_chance = search(lambda told: sweeps.drawn(axes, 0, len(told)))
    assert sum(learnt) < 0.5 * sum(by_chance)
