"""The rendezvous: how ranks find each other before there is a process group, and hear of one that cannot begin.

The store is torchrun's own or one that rank 0 serves at MASTER_ADDR:MASTER_PORT. All waiting is done in slices in
Python, so that a signal ends it at once, and every 10 s whoever is missing is named.
"""

import contextlib
import datetime
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist

from bigtrain.errors import BigtrainError, ConfigError, NetworkError, of_all_ranks
from bigtrain.log import get_logger
from bigtrain.processes import RankInfo, has_agent_store, interface_names, master_address

T = TypeVar("T")

TELL_SECONDS = 10.0
RESOLVE_SECONDS = 15.0  # A cluster may publish the name of a node that has just begun a little later
ANSWER_SECONDS = 6.0  # what accepts a connection and does not answer for so long is no store
LINGER_SECONDS = 10.0  # so long rank 0, if some rank cannot begin, serves the store for the others to hear
TELL_RANK_0_SECONDS = 60.0  # so long another rank that cannot begin waits to tell rank 0, which may still be importing
_POLL_SECONDS = 0.02
_NUM_TRIES = 3


class Patience:
    """Waits in slices, says for whom every 10 s, and not for ever."""

    def __init__(self, seconds: float, *, quiet: bool = False) -> None:
        """Begin to wait for ``seconds`` at most, without a word if ``quiet``."""
        self._begin = time.monotonic()
        self._seconds, self._quiet = seconds, quiet
        self._next_word = TELL_SECONDS

    @property
    def waited(self) -> float:
        return time.monotonic() - self._begin

    def pause(self, whom: str) -> None:
        """Wait a moment for ``whom``; NetworkError: for too long already."""
        if self.waited > self._seconds:
            raise NetworkError(f"no word from {whom} in {self._seconds:.0f} s")
        if self.waited > self._next_word and not self._quiet:
            self._next_word += TELL_SECONDS
            get_logger().error(f"waiting for {whom} ({self.waited:.0f} s)")  # an error is shown on every rank
        time.sleep(_POLL_SECONDS)


def meet(info: RankInfo, *, timeout_seconds: float, refusal: str = "", quiet: bool = False) -> dist.Store:
    """Wait until all ranks, of a world of several, have come and return a store that is theirs alone.

    ``timeout_seconds`` limits the wait and the store. With a ``refusal`` this rank cannot begin, and no other does;
    with ``quiet`` nothing is said of missing ranks. ConfigError: the address or port is of no use, or a rank cannot
    begin. NetworkError: a rank has not come in time, or the store is gone.
    """
    address, patience = master_address(), Patience(timeout_seconds, quiet=quiet)
    is_server = info.rank == 0 and not has_agent_store()
    try:
        store = _serve(address[1]) if is_server else _connect(address, patience)
        name = agree_on_name(store, info, patience, refusal=refusal)
    except RuntimeError as error:
        whose = "torchrun" if has_agent_store() else "rank 0"
        raise NetworkError(
            f"{whose} at {address[0]}:{address[1]} has ended before all ranks had come; it says why"
        ) from error
    except BigtrainError as error:
        error.shared = bool(error.shared)  # nobody can be told
        raise
    store.set_timeout(datetime.timedelta(seconds=timeout_seconds))
    return dist.PrefixStore(name, store)


def refuse(info: RankInfo, reason: str) -> bool:
    """Tell ranks that wait that this one cannot begin; return whether rank 0 has heard, and says it."""
    if info.world_size == 1 or dist.is_initialized() or (info.rank == 0 and has_agent_store()):
        return False  # torchrun ends all ranks when rank 0 has ended
    with contextlib.suppress(BigtrainError, RuntimeError, OSError):
        is_first = info.rank == 0
        meet(info, timeout_seconds=LINGER_SECONDS if is_first else TELL_RANK_0_SECONDS, refusal=reason, quiet=is_first)
        return not is_first
    return False


def agree_on_name(store: dist.Store, info: RankInfo, patience: Patience, *, refusal: str = "") -> str:
    """Return a name for this process group that none before it had, the same on all ranks.

    After a restart torchrun goes on with the store of the processes that are gone, and their addresses are still in it
    (pytorch issue 135712); its count of restarts differs between nodes. So every rank asks under a name that is new,
    rank 0 answers each, and is done when all have confirmed its answer: the dead never do. A rank that cannot begin
    says so when it confirms; then rank 0 tells all. ConfigError: a rank cannot begin; on all but that one.
    NetworkError: one has not come in time. RuntimeError: the store is gone.
    """
    own = uuid.uuid4().hex
    if info.rank == 0:
        _gather(store, info, patience, own, refusal)
        return own
    store.set(f"bigtrain/ask/{info.rank}", own)
    whom = "rank 0, which is to answer at MASTER_ADDR:MASTER_PORT"
    name = _wait_for(store, f"bigtrain/answer/{own}", patience, whom)
    told = refusal and f"rank {info.rank} on {socket.gethostname()}: {refusal}"
    store.set(f"bigtrain/confirm/{name}/{info.rank}", told)
    if not refusal and (verdict := _wait_for(store, f"bigtrain/verdict/{name}", patience, "the other ranks")):
        raise of_all_ranks(ConfigError(verdict))
    return name


def _gather(store: dist.Store, info: RankInfo, patience: Patience, name: str, refusal: str) -> None:
    """Answer on rank 0 until all others have confirmed; if one cannot begin, those that are there."""
    verdict = refusal and f"rank 0 on {socket.gethostname()}: {refusal}"
    if verdict:
        store.set(f"bigtrain/verdict/{name}", verdict)
    missing = set(range(1, info.world_size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"bigtrain/ask/{rank}"]):
                store.set(f"bigtrain/answer/{store.get(f'bigtrain/ask/{rank}').decode()}", name)
            if store.check([key := f"bigtrain/confirm/{name}/{rank}"]):
                missing.discard(rank)
                if not verdict and (verdict := store.get(key).decode()):
                    store.set(f"bigtrain/verdict/{name}", verdict)
                    patience = Patience(LINGER_SECONDS, quiet=True)
        try:
            patience.pause(f"{spell_ranks(missing)} of {info.world_size}")
        except NetworkError:
            if verdict:
                break
            raise
    if verdict and not refusal:
        raise of_all_ranks(ConfigError(verdict))
    store.set(f"bigtrain/verdict/{name}", verdict)


def require_interfaces(*, cuda: bool) -> None:
    """Raise a ConfigError if this node lacks a network interface that the environment names for gloo or, with ``cuda``, NCCL."""
    present = [name for _, name in socket.if_nameindex()]
    for variable, value, is_there in interface_names(present, cuda=cuda):
        if not is_there:
            raise ConfigError(
                f"{variable}={value}: {socket.gethostname()} has no such network interface; it has {', '.join(present)}; set "
                f"the one that reaches the other nodes, or unset {variable}"
            )


def in_slices(function: Callable[[], T], patience: Patience, whom: str) -> T:
    """Return what ``function`` does in native code, in a thread, so that a signal ends this process meanwhile."""
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = function()
        except BaseException as error:
            outcome["error"] = error

    threading.Thread(target=work, daemon=True).start()
    while not outcome:
        patience.pause(whom)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]


def spell_ranks(ranks: Iterable[int]) -> str:
    """Return ``rank 1`` or ``ranks 1, 4-7``; of very many, the first."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    spelt = ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs[:16])
    more = ", ..." if len(runs) > 16 else ""
    return f"rank{'s' if len(runs) > 1 or '-' in spelt else ''} {spelt}{more}"


def _wait_for(store: dist.Store, key: str, patience: Patience, whom: str) -> str:
    while not store.check([key]):
        patience.pause(whom)
    return store.get(key).decode()


def _serve(port: int) -> dist.Store:
    """Return the store, served by this process on all interfaces."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        listener = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"MASTER_PORT={port} cannot be opened on {socket.gethostname()}: {os.strerror(error.errno)}; set another one, "
            "the same for all ranks"
        ) from error
    bound = listener.getsockname()[1]
    return dist.TCPStore("localhost", bound, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _connect(address: tuple[str, int], patience: Patience) -> dist.Store:
    """Return the store at ``address``, as soon as there is one."""
    limit = datetime.timedelta(seconds=ANSWER_SECONDS)
    where, problem, num_tries = f"MASTER_ADDR:MASTER_PORT = {address[0]}:{address[1]}", "", 0
    while True:
        try:
            in_slices(lambda: socket.create_connection(address, timeout=5.0).close(), Patience(30.0, quiet=True), where)
        except socket.gaierror as error:
            problem = error.strerror
            if patience.waited > RESOLVE_SECONDS:
                raise ConfigError(
                    f"MASTER_ADDR={address[0]}: {socket.gethostname()} does not know that name ({problem}); set the name or "
                    "address of rank 0's node as every node knows it"
                ) from error
        except (OSError, NetworkError) as error:
            problem = getattr(error, "strerror", None) or str(error)
        else:
            num_tries += 1
            with contextlib.suppress(NetworkError, RuntimeError), _quiet_stderr():
                client = partial(dist.TCPStore, *address, is_master=False, wait_for_workers=False, timeout=limit)
                return in_slices(client, Patience(ANSWER_SECONDS, quiet=True), where)
            if num_tries == _NUM_TRIES or patience.waited > ANSWER_SECONDS:
                raise ConfigError(
                    f"{where} answers, but not as rank 0 does: another program has that port; set another MASTER_PORT, the same "
                    "for all ranks"
                )
        patience.pause(f"rank 0 at {where}: {problem}")


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Keep to itself what torch's C++ says of a server that is no store: two stacks per try, and no reason."""
    with open(os.devnull, "wb") as nowhere:
        stderr = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
