"""A generator and its discriminator are the same run under every engine, with the same images and the same distance."""

import base64
import json

import numpy as np
import pytest

from bigtrain.cli.hydra_cli import read_run
from bigtrain.config import EngineKind
from bigtrain.telemetry.history import read_history
from bigtrain.telemetry.report import render
from bigtrain.testing.parity import Case, compare, configure
from bigtrain.testing.ranks import run_ranks
from tests.distributed.launches import events, fork, metrics
from tests.distributed.tasks_test import RUN, traces

Image = pytest.importorskip("PIL.Image")
GIVEN = ["+model=gan_digits", "model.settings.channels=[8,4]", "task=gan", "task.noise_dim=5", "data=images", *RUN]
GIVEN += ["data.validation_fraction=0.2", "optimizer.betas=[0.5,0.99]", "optimizer.eps=1e-4"]
KINDS = {2: ("ddp", "fsdp", "zero2", "zero3"), 4: ("ddp", "fsdp", "zero2")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place, random = tmp_path_factory.mktemp("gan"), np.random.default_rng(0)
    for number in range(60):
        directory = place / "pictures" / f"class{number % 3}"
        directory.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(directory / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def given(place):
    return [*GIVEN, f"data.path={place}/pictures", f"data.root={place}/data", f"run.root={place}/runs"]


@pytest.fixture(scope="module")
def alone(given):
    """What one process computes, and with another seed."""
    return run_ranks(traces, 1, [read_run(given), read_run([*given, "train.seed=1"])], timeout_seconds=100)[0]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_engines_and_worlds_agree(world_size, given, alone):
    reference, other = alone
    assert len(set(reference.losses)) == 4 and compare(other, reference).loss > 1e-4
    cases = [Case(EngineKind[kind], world_size, 1 if kind == "fsdp" else 2) for kind in KINDS[world_size]]
    configs = [configure(read_run(given), case) for case in cases]
    for case, found in zip(cases, run_ranks(traces, world_size, configs, timeout_seconds=200)[0], strict=True):
        difference = compare(found, reference)
        print(case, difference)
        assert max(difference.loss, difference.grad_norm) <= 1e-5, case


def test_stopped_and_continued_elsewhere_it_makes_the_same_images(given, place):
    def train(world_size, *more):
        done = fork(
            "train.py",
            *given,
            "validation.every_steps=2",
            "train.log_every_steps=1",
            *more,
            cwd=place,
            world_size=world_size,
        )
        assert done.code in (0, 75), done.err

    classifier = [
        "+model=cnn_digits",
        "model.settings.channels=[4]",
        "model.settings.dense_dim=4",
        "task=classification",
    ]
    classifier += [s for s in given if not s.startswith(("+model", "model", "task"))]
    done = fork("train.py", *classifier, "run.name=classifier", cwd=place)
    assert done.code == 0, done.err
    train(1, "validation.frechet=runs/classifier", "run.name=whole")
    train(2, "validation.frechet=runs/classifier", "engine=fsdp", "run.name=parts", "run.stop_after_steps=2")
    train(3, "validation.frechet=runs/classifier", "engine=zero2", "run.name=parts")
    whole, parts = place / "runs/whole", place / "runs/parts"
    assert [r["data_digest"] for r in metrics(parts)] == [r["data_digest"] for r in metrics(whole)]
    assert [r["loss"] for r in metrics(parts)] == pytest.approx([r["loss"] for r in metrics(whole)], rel=1e-5)
    for found, right in zip(events(parts, "validation"), events(whole, "validation"), strict=True):
        assert found["frechet"] > 0 and found["frechet"] == pytest.approx(right["frechet"], rel=1e-4)
        assert found["real_right"] == right["real_right"]
    pictures = [json.loads((run / "images.json").read_text())["pictures"] for run in (whole, parts)]
    assert [picture["step"] for picture in pictures[1]] == [2, 4] and pictures[0][0]["shape"] == [72, 72, 1]
    bytes_of = [[np.frombuffer(base64.b64decode(p["pixels"]), np.uint8).astype(int) for p in own] for own in pictures]
    assert all(np.abs(one - other).max() <= 1 for one, other in zip(*bytes_of, strict=True))
    assert np.abs(bytes_of[0][0] - bytes_of[0][1]).max() > 1, "they change with the weights"
    pytest.importorskip("matplotlib")
    assert render([read_history(whole)]).count('<img alt="step') == 2
    refused = fork(
        "train.py", *given, "validation.every_steps=2", "validation.frechet=runs/whole", "run.name=new", cwd=place
    )
    assert (
        refused.code == 2 and "must be a run of task=classification" in refused.err and "Traceback" not in refused.err
    )
