"""Two torchrun agents in two network namespaces, and the cable between them: cut, and plugged in again."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bigtrain.checkpoint.store import find_checkpoints
from tests.distributed.launches import SMALL, TRAIN, Launch, fork, num_steps, program, trajectory
from tests.faults.injection import RUN, state_hashes

HANG_SECONDS, FIRST_HANG_SECONDS = 2, 15
TRAINING = [
    *SMALL,
    "engine=ddp",
    "model.dropout=0.1",
    "train.steps=240",
    "checkpoint.every_steps=20",
    f"supervision.hang_seconds={HANG_SECONDS}",
    f"supervision.first_hang_seconds={FIRST_HANG_SECONDS}",
]
ADDRESSES = ("10.213.0.1", "10.213.0.2")


def ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(args)}: {done.stderr.strip()}")


@pytest.fixture
def machines() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a cable between their ``eth0``."""
    names = (f"bigtrain{os.getpid()}a", f"bigtrain{os.getpid()}b")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        except OSError as error:
            pytest.skip(f"network namespaces need root and iproute2: {error}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                ip("netns", "delete", name)


def start_agents(stack: contextlib.ExitStack, machines: tuple[str, str], cwd: Path) -> list[Launch]:
    agents = []
    for rank, machine in enumerate(machines):
        rendezvous = [f"--node-rank={rank}", f"--master-addr={ADDRESSES[0]}", "--master-port=29500"]
        torchrun = [program("torchrun"), "--nnodes=2", "--nproc-per-node=1", *rendezvous, TRAIN, *TRAINING]
        command = ["ip", "netns", "exec", machine, *torchrun]
        agents.append(stack.enter_context(Launch(command, cwd, GLOO_SOCKET_IFNAME="eth0")))
    return agents


def test_a_network_that_is_cut_ends_both_sides_and_the_same_command_continues(
    machines: tuple[str, str], tmp_path: Path
):
    assert fork("train.py", *TRAINING, "run.name=whole", cwd=tmp_path, world_size=2).code == 0
    run, whole = tmp_path / RUN, tmp_path / "runs/whole"
    with contextlib.ExitStack() as stack:
        agents = start_agents(stack, machines, tmp_path)
        agents[0].wait_until(lambda: num_steps(run) >= 50 and bool(find_checkpoints(run)))
        ip("-n", machines[0], "link", "set", "eth0", "down")
        ended = [agent.result(timeout_seconds=4 * FIRST_HANG_SECONDS) for agent in agents]
    assert [result.code for result in ended] == [1, 1]
    reached = num_steps(run)
    assert 50 <= reached < 240, "the cable was cut on the way"
    # Neither side can tell more than that the other is silent; each leaves its word.
    found = json.loads((run / "failure.json").read_text())
    assert found["kind"] == "hang"
    assert found["step"] >= reached
    assert len(list((run / "failures/attempt-00001").glob("rank-*.json"))) == 2
    assert "First cause: " in ended[0].err + ended[1].err
    ip("-n", machines[0], "link", "set", "eth0", "up")
    with contextlib.ExitStack() as stack:
        agents = start_agents(stack, machines, tmp_path)
        results = [agent.result() for agent in agents]
        assert [result.code for result in results] == [0, 0], results
    assert trajectory(run) == trajectory(whole)
    assert state_hashes(run) == state_hashes(whole)
