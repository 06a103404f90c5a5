"""Ranks find each other, name those that are missed, and hear of those that cannot begin. Real sockets, stores and processes."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from bigtrain import processes
from bigtrain.distributed import rendezvous
from bigtrain.distributed.rendezvous import (
    Patience,
    agree_on_name,
    in_slices,
    meet,
    refuse,
    require_interfaces,
    spell_ranks,
)
from bigtrain.errors import BigtrainError, ConfigError, NetworkError
from bigtrain.processes import RankInfo
from bigtrain.testing.ranks import free_port
from tests.distributed.launches import SMALL, TRAIN, Launch


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Let the environment name a free port of this machine."""
    number = free_port()
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(number))
    yield number


def on_ranks(world_size: int, function: Callable[[RankInfo], object], *, without: int = -1) -> dict[int, object]:
    """Return what a function returns or raises on each rank, which are threads."""
    results: dict[int, object] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = function(RankInfo(rank, world_size, rank, world_size))
        except BigtrainError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size) if rank != without]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_all_ranks_agree_on_a_name_that_dead_ones_did_not_have():
    store = dist.HashStore()
    names: list[object] = []
    for _ in range(3):  # restarts, with all that the processes before them left in the store
        found = on_ranks(3, lambda info: agree_on_name(store, info, Patience(10)))
        assert len(set(found.values())) == 1
        names += set(found.values())
    assert len(set(names)) == 3


def test_all_ranks_meet_at_the_store_of_rank_0(port: int):
    stores = on_ranks(3, lambda info: meet(info, timeout_seconds=30))
    stores[1].set("key", "value")
    assert [store.get("key") for store in stores.values()] == [b"value"] * 3


def test_ranks_that_do_not_come_are_named(port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(rendezvous, "TELL_SECONDS", 0.1)
    monkeypatch.setattr(rendezvous.get_logger(), "propagate", True)
    found = on_ranks(6, lambda info: meet(info, timeout_seconds=2), without=2)
    assert isinstance(found[0], NetworkError)
    assert str(found[0]) == "no word from rank 2 of 6 in 2 s"
    assert "waiting for rank 2 of 6 (" in caplog.text
    assert spell_ranks([7, 1, 2, 4, 3]) == "ranks 1-4, 7"


def test_a_rank_whose_rank_0_is_absent_names_the_address(
    port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(rendezvous, "TELL_SECONDS", 0.1)
    monkeypatch.setattr(rendezvous.get_logger(), "propagate", True)
    with pytest.raises(NetworkError, match=f"no word from rank 0 at .*127.0.0.1:{port}: Connection refused"):
        meet(RankInfo(1, 2, 1, 2), timeout_seconds=1)
    assert f"waiting for rank 0 at MASTER_ADDR:MASTER_PORT = 127.0.0.1:{port}: Connection refused (" in caplog.text


@pytest.mark.parametrize("refusing", [0, 1])
def test_a_rank_that_cannot_begin_ends_all_with_its_reason(refusing: int, port: int):
    def begin(info: RankInfo) -> object:
        return refuse(info, "too little memory") if info.rank == refusing else meet(info, timeout_seconds=30)

    found = on_ranks(3, begin)
    assert found.pop(refusing) is (refusing != 0), "rank 0 has heard of it, and speaks"
    for error in found.values():
        assert isinstance(error, ConfigError)
        assert str(error) == f"rank {refusing} on {socket.gethostname()}: too little memory"
        assert error.shared, "rank 0 says it"


def test_ranks_that_all_cannot_begin_wait_for_nobody(port: int):
    assert on_ranks(3, lambda info: refuse(info, "the same")) == {0: False, 1: True, 2: True}


def test_a_refusal_of_the_launch_before_does_not_end_this_one():
    store = dist.HashStore()

    def begin(info: RankInfo) -> object:
        return agree_on_name(store, info, Patience(0.5, quiet=True), refusal="gone" if info.rank == 1 else "")

    before = on_ranks(2, begin)
    assert isinstance(before[0], ConfigError)
    found = on_ranks(2, lambda info: agree_on_name(store, info, Patience(10)))
    assert found[0] == found[1]


def test_a_port_that_is_taken_is_named(port: int):
    with socket.create_server(("", port)), pytest.raises(ConfigError, match=f"MASTER_PORT={port} cannot be opened"):
        meet(RankInfo(0, 2, 0, 2), timeout_seconds=30)


STRANGER = """
import os, socket, sys, threading
from bigtrain.distributed import rendezvous
from bigtrain.errors import ConfigError
from bigtrain.processes import RankInfo

answer, rendezvous.ANSWER_SECONDS = {answer!r}, 1.0
server, kept = socket.create_server(("127.0.0.1", 0)), []
os.environ |= {{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}}

def serve():
    while True:
        connection, _ = server.accept()
        kept.append(connection)
        if answer is not None:
            connection.sendall(answer)
            connection.close()

threading.Thread(target=serve, daemon=True).start()
try:
    rendezvous.meet(RankInfo(1, 2, 1, 2), timeout_seconds=30)
except ConfigError as error:
    print(error, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("answer", [None, b"", b"HTTP/1.0 400 Bad Request\r\n\r\n"], ids=["silent", "closes", "http"])
def test_another_program_at_the_port_is_named(answer: bytes | None):
    # In a process of its own: torch's client, once given up, goes on, and its C++ speaks when it may be heard again.
    command = [sys.executable, "-c", STRANGER.format(answer=answer)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert re.match(
        r"MASTER_ADDR:MASTER_PORT = 127\.0\.0\.1:\d+ answers, but not as rank 0 does: another program", done.stdout
    )
    assert "frame #" not in done.stderr, "stacks of torch's C++ say less than the error"


def test_a_name_that_nobody_knows_is_named(port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rendezvous, "RESOLVE_SECONDS", 0.1)
    monkeypatch.setenv("MASTER_ADDR", "node.invalid")
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=node\.invalid: .* does not know that name"):
        meet(RankInfo(1, 2, 1, 2), timeout_seconds=60)


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"RANK": "one"}, "RANK=one in the environment is no number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2"),
        ({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=3 of LOCAL_WORLD_SIZE=2"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT=http in the environment is no number"),
        ({"MASTER_PORT": "70000"}, "needs MASTER_ADDR and MASTER_PORT"),
        ({"MASTER_ADDR": ""}, "needs MASTER_ADDR and MASTER_PORT"),
        ({}, None),
    ],
)
def test_what_a_launcher_sets_is_checked(
    variables: dict[str, str], problem: str | None, port: int, monkeypatch: pytest.MonkeyPatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    try:
        RankInfo.from_env()
        processes.master_address()
    except ConfigError as error:
        assert problem
        assert problem in str(error)
    else:
        assert problem is None


@pytest.mark.parametrize(
    ("variable", "value", "cuda", "is_right"),
    [
        ("GLOO_SOCKET_IFNAME", "nope", False, False),
        ("GLOO_SOCKET_IFNAME", "lo", False, True),
        ("GLOO_SOCKET_IFNAME", "lo,nope", False, False),
        ("NCCL_SOCKET_IFNAME", "nope", True, False),
        ("NCCL_SOCKET_IFNAME", "nope", False, True),  # nobody asks for it
        ("NCCL_SOCKET_IFNAME", "nope,l", True, True),  # beginnings of names
        ("NCCL_SOCKET_IFNAME", "=l", True, False),
        ("NCCL_SOCKET_IFNAME", "^nope", True, True),
    ],
)
def test_interfaces_that_are_not_there_are_named(
    variable: str, value: str, cuda: bool, is_right: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv(variable, value)
    if is_right:
        require_interfaces(cuda=cuda)
    else:
        with pytest.raises(ConfigError, match=re.escape(f"{variable}={value}: ")):
            require_interfaces(cuda=cuda)


def test_native_code_is_waited_for_in_slices():
    assert in_slices(lambda: 7, Patience(10), "it") == 7
    with pytest.raises(ZeroDivisionError):
        in_slices(lambda: 1 // 0, Patience(10), "it")
    with pytest.raises(NetworkError, match="no word from it"):
        in_slices(lambda: time.sleep(5), Patience(0.1), "it")


# The command, in processes of their own


def rank_environ(rank: int, port: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}


def test_a_wrong_value_on_one_rank_ends_both_and_then_a_stop_ends_the_wait(port: int, tmp_path: Path):
    command = [sys.executable, TRAIN, *SMALL]
    with (
        Launch(command, tmp_path, **rank_environ(0, port)) as zero,
        Launch([*command, "optimizer.lr=-1"], tmp_path, **rank_environ(1, port)) as one,
    ):
        first, second = zero.result(), one.result()
    assert (first.code, second.code) == (2, 2)
    assert first.err.startswith(f"rank 1 on {socket.gethostname()}: optimizer.lr=-1.0: ")
    assert "optimizer.lr" not in second.err, "rank 0 has said it"
    assert not (tmp_path / "runs").exists()
    with Launch(command, tmp_path, **rank_environ(0, port)) as alone:
        alone.wait_until(lambda: accepts(port))
        alone.process.send_signal(signal.SIGTERM)
        ended = alone.result()  # long before the end of its patience
    assert ended.code == 75
    assert "stopped by SIGTERM before the first step" in ended.err


def accepts(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
