"""Every launcher starts the same script, and the run is the same under all of them."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from bigtrain.testing.ranks import free_port
from tests.distributed.launches import (
    SMALL,
    TRAIN,
    Launch,
    Result,
    events,
    fork,
    launch,
    metrics,
    program,
    torchrun,
    trajectory,
)

STEPS = ["train.steps=4", "run.stop_after_steps=2"]
DEFAULTS = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
# Where there is no GPU, `accelerate launch` starts several processes only as if for GPUs.
ACCELERATE = {
    "accelerate": ["--cpu", "--num_processes=1"],
    "accelerate-ddp": ["--multi_gpu", "--num_processes=2"],
}
WORLD_SIZES = {"torchrun": 2, "deepspeed": 2, "accelerate": 1, "accelerate-ddp": 2}


def command(launcher: str) -> list[str]:
    """Return the command that starts the training with a launcher, under an engine that goes with it."""
    training = [TRAIN, *SMALL, *STEPS, f"run.name={launcher}"]
    if launcher == "torchrun":
        return torchrun(2, *training, "engine=fsdp")
    if launcher == "deepspeed":
        return [program("deepspeed"), "--num_gpus=2", f"--master_port={free_port()}", *training, "engine=zero2"]
    port = f"--main_process_port={free_port()}"
    return [program("accelerate"), "launch", *ACCELERATE[launcher], *DEFAULTS, port, *training, "engine=accelerate"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launchers")


@pytest.fixture(scope="module")
def results(directory: Path) -> Iterator[dict[str, Result]]:
    """How the launch with each launcher ended; they run side by side, which saves half of the time."""
    with contextlib.ExitStack() as stack:
        running = {name: stack.enter_context(Launch(command(name), directory)) for name in WORLD_SIZES}
        yield {name: launched.result(200) for name, launched in running.items()}


@pytest.fixture(scope="module")
def reference(directory: Path) -> list[tuple[int, float, float, float]]:
    result = fork("train.py", *SMALL, *STEPS, "run.name=reference", "engine=ddp", cwd=directory)
    assert result.code == 75
    return trajectory(directory / "runs/reference")


@pytest.mark.parametrize("launcher", WORLD_SIZES)
def test_every_launcher_computes_the_same_run(
    launcher: str, directory: Path, results: dict[str, Result], reference: list[tuple[int, float, float, float]]
):
    result, run = results[launcher], directory / "runs" / launcher
    assert "The same command continues" in result.out, result
    assert "Traceback" not in result.err
    # The launchers that would report any code of a stopped run as a failure see none.
    assert result.code == (75 if launcher == "deepspeed" else 0)
    (start,) = events(run, "start")
    assert start["world_size"] == WORLD_SIZES[launcher]
    assert len(metrics(run)) == len(reference) == 2
    for step, expected in zip(trajectory(run), reference, strict=True):
        assert step == pytest.approx(expected, rel=1e-6)
    saved = yaml.safe_load((run / "config.yaml").read_text())["engine"]["kind"]
    assert saved == {"torchrun": "fsdp", "deepspeed": "zero2"}.get(launcher, "accelerate")


def test_rank_0_alone_speaks(results: dict[str, Result]):
    for result in results.values():
        assert sum(line.startswith("step 2/4") for line in result.out.splitlines()) == 1


def test_deepspeed_may_pass_the_rank_as_an_argument(tmp_path: Path):
    result = launch([sys.executable, TRAIN, "--local_rank=0", *SMALL, "train.stpes=1"], tmp_path)
    assert result.code == 2
    assert "train.stpes: unknown key" in result.err
    assert "local_rank" not in result.err
