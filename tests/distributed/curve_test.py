"""The law of losses by size: found again in numbers that follow it, and in runs of nested sizes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from bigtrain.cli import curve
from bigtrain.errors import ConfigError, DataError
from bigtrain.run.law import Law, Point, fit, interval
from tests.distributed.launches import SMALL, fork

TRUE = Law(E=1.7, A=400.0, alpha=0.34, B=410.0, beta=0.28)


def points(law: Law, parameters: list[float], sizes: list[float], noise: float = 0.0) -> list[Point]:
    random = np.random.default_rng(0)
    return [
        Point(f"{n:g}-{d:g}", int(n), d, 1.0, law.loss(n, d) * float(np.exp(noise * random.normal())), "tokens")
        for n in parameters
        for d in sizes
    ]


def test_the_law_is_found_again():
    found, again = fit(points(TRUE, [1e6, 1e7, 1e8, 1e9], [1e7, 1e8, 1e9, 1e10]))
    assert pytest.approx(1.7, rel=0.02) == found.E
    assert (found.alpha, found.beta) == (pytest.approx(0.34, rel=0.02), pytest.approx(0.28, rel=0.02))
    assert found.loss(1e10, 1e11) == pytest.approx(TRUE.loss(1e10, 1e11), rel=0.005)
    parameters, size = found.best(6e20, 1.0, points(TRUE, [1e9], [1e10])[0])
    assert 6 * parameters * size == pytest.approx(6e20)
    neighbours = [found.loss(parameters * factor, size / factor) for factor in (0.8, 1.0, 1.25)]
    assert min(neighbours) == neighbours[1]
    assert len(again) == 200


def test_intervals_hold_the_truth_and_grow_with_noise():
    quiet, noisy = (fit(points(TRUE, [1e6, 1e7, 1e8], [1e7, 1e8, 1e9], noise))[1] for noise in (0.001, 0.02))
    low, high = interval([law.loss(1e9, 1e10) for law in noisy])
    assert low < TRUE.loss(1e9, 1e10) < high
    ends = interval([law.loss(1e9, 1e10) for law in quiet])
    assert ends[1] - ends[0] < 0.5 * (high - low)


def test_a_size_that_is_not_varied_is_no_term():
    found, _ = fit(points(TRUE, [1e7], [1e6, 1e7, 1e8, 1e9, 1e10]))
    assert found.A == 0 and found.beta == pytest.approx(0.28, rel=0.05)
    assert pytest.approx(1.7 + TRUE.terms(1e7, 1)[0], rel=0.02) == found.E
    with pytest.raises(DataError, match="a law needs sizes of model and data"):
        fit(points(TRUE, [1e7], [1e8]))
    with pytest.raises(DataError, match="a law needs 4 runs or more"):
        fit(points(TRUE, [1e7], [1e7, 1e8, 1e9]))


def test_runs_of_nested_sizes_are_read(tmp_path: Path):
    args = [*SMALL, "train.epochs=1", "validation.every_steps=100", "validation.batches=1", "data=records"]
    tokens = np.random.default_rng(0).integers(0, 97, size=(400, 17))
    np.savez(tmp_path / "rows.npz", tokens=tokens[:, :-1], targets=tokens[:, 1:])
    args = [arg for arg in args if not arg.startswith(("data=synthetic", "train.steps", "train.log"))]
    for size in (16, 32, 64, 128):
        own = ["data.path=rows.npz", f"data.max_train_samples={size}", f"run.name=of-{size}", "run.root=runs/sizes"]
        result = fork("train.py", *args, *own, cwd=tmp_path)
        assert result.code == 0, result.err
    runs = [f"runs/sizes/of-{size}" for size in (16, 32, 64, 128)]
    result = fork("curve.py", *runs, "compute=[1e12]", cwd=tmp_path)
    assert result.code == 0, result.err
    assert re.search(r"with 1e\+12 operations: parameters \S+ \(\S+ to \S+\), tokens \S+ .*, loss", result.out)
    assert "are for want of data" in result.out
    page = (tmp_path / "curve.html").read_text()
    assert "2,048" in page and "Loss by size" in page, "128 samples of 16 tokens"
    events = tmp_path / "runs/sizes/of-16/events.jsonl"
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    lines = [line | {"loss": None} if line["event"] == "validation" else line for line in lines]
    events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = fork("curve.py", *runs, cwd=tmp_path)
    assert result.code == 2 and "of-16: the loss of its last validation is no number" in result.err


def test_losses_of_two_kinds_make_no_law(monkeypatch: pytest.MonkeyPatch):
    found = iter([Point("a", 1, 1.0, 1.0, 1.0, "tokens"), Point("b", 1, 1.0, 1.0, 1.0, "samples")])
    monkeypatch.setattr("bigtrain.run.law.read_point", lambda _: next(found))
    with pytest.raises(ConfigError, match="these runs count tokens and samples"):
        curve.run(curve.CurveConfig(runs=["a", "b"]))
