"""Plain torchrun with several agents: elastic restarts, and a rendezvous that listens on one address only."""

import contextlib
import datetime
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters, rendezvous_handler_registry

from bigtrain.checkpoint.store import find_checkpoints
from bigtrain.distributed import torchrun
from bigtrain.supervise.attempt import read_exit
from bigtrain.testing.ranks import free_port
from tests.distributed.launches import SMALL, TRAIN, Launch, events, fork, program, trajectory

# By default torchrun's agents keep one store for all restarts, and ranks read the addresses of dead ones in it.
AGENT_VARIABLES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"}
TRAINING = [*SMALL, "engine=ddp", "train.steps=150", "checkpoint.every_steps=25"]


def rank_processes(agent: Launch) -> list[psutil.Process]:
    return [p for p in psutil.Process(agent.process.pid).children() if TRAIN in p.cmdline()]


def test_two_agents_start_all_ranks_again_when_one_dies(tmp_path: Path):
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=restart"]
    agent = [program("torchrun"), "--nnodes=2", "--nproc-per-node=1", "--max-restarts=2", *rendezvous, TRAIN, *TRAINING]
    run = tmp_path / "runs/gpt_nano"
    with contextlib.ExitStack() as stack:
        agents = [stack.enter_context(Launch(agent, tmp_path, **AGENT_VARIABLES)) for _ in range(2)]
        agents[0].wait_until(lambda: bool(find_checkpoints(run)))
        (victim,) = rank_processes(agents[1])
        os.kill(victim.pid, signal.SIGKILL)
        assert [launched.result().code for launched in agents] == [0, 0], [a.result() for a in agents]
    (resume,) = events(run, "resume")
    assert resume["step"] >= 25
    assert events(run, "finished")[0]["step"] == 150
    assert fork("train.py", *TRAINING, "run.name=whole", cwd=tmp_path, world_size=2).code == 0
    assert trajectory(run) == trajectory(tmp_path / "runs/whole")


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_ranks_save_and_stop_when_torchrun_is_gone(tmp_path: Path, number: int):
    command = [program("torchrun"), "--standalone", "--nproc-per-node=2", TRAIN, *TRAINING, "train.steps=100000"]
    run = tmp_path / "runs/gpt_nano"
    with Launch(command, tmp_path, **AGENT_VARIABLES) as agent:
        agent.wait_until(lambda: bool(find_checkpoints(run)))
        ranks = rank_processes(agent)
        agent.process.send_signal(number)
        _, alive = psutil.wait_procs(ranks, timeout=60)
        assert (len(ranks), alive) == (2, [])
    ended = read_exit(run)
    assert (ended["code"], ended["reason"]) == (75, "SIGTERM")
    assert find_checkpoints(run)[-1].name == f"step-{ended['step']:08d}"


@pytest.fixture
def bound() -> torchrun.BoundRendezvous:
    port = free_port()
    params = RendezvousParameters("bound", f"127.0.0.2:{port}", "id", min_nodes=2, max_nodes=2, rank="0", timeout="20")
    return rendezvous_handler_registry.create_handler(params)


def listening(port: int) -> list[str]:
    connections = psutil.Process().net_connections(kind="tcp")
    return [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port]


def test_a_bound_rendezvous_listens_on_its_address_only(bound: torchrun.BoundRendezvous):
    assert listening(bound.master_port) == ["127.0.0.2"]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", bound.master_port), timeout=5)
    endpoint = f"127.0.0.2:{bound.master_port}"
    other = RendezvousParameters("bound", endpoint, "id", min_nodes=2, max_nodes=2, rank="1", timeout="20")
    bound.next_rendezvous().store.set("key", "value")
    info = torchrun.build_bound_rendezvous(other).next_rendezvous()
    assert (info.rank, info.world_size, info.store.get("key")) == (1, 2, b"value")


def test_torchruns_own_rendezvous_listens_everywhere():
    store = TCPStore("127.0.0.2", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=20))
    assert listening(store.port) == ["::"]
    socket.create_connection(("127.0.0.1", store.port), timeout=5).close()


def test_a_bound_rendezvous_needs_the_rank():
    with pytest.raises(ValueError, match="rank="):
        torchrun.build_bound_rendezvous(RendezvousParameters("bound", "127.0.0.2:1", "id", 1, 1))


@pytest.mark.parametrize(("script", "hooked"), [(TRAIN, True), ("elsewhere/train.py", False)])
def test_only_the_run_speaks_of_a_signal(script: str, hooked: bool, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(sys, "argv", ["torchrun", "--standalone", script, "+model=gpt_nano"])
    assert torchrun.bound_handler() is torchrun.build_bound_rendezvous
    assert (sys.excepthook is torchrun.leave_the_run_the_last_word) is hooked
    torchrun.leave_the_run_the_last_word(SignalException, SignalException("got signal", signal.SIGINT), None)
    assert capsys.readouterr().err == ""
    torchrun.leave_the_run_the_last_word(ValueError, ValueError("another fault"), None)
    assert capsys.readouterr().err == "ValueError: another fault\n"
