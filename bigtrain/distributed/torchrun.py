"""What torchrun itself takes of this package: by the entry point ``torchrun.handlers``, or ``launch/bound_torchrun.py``.

A rendezvous that listens on one address; and silence where torchrun would show, below the run's last word, a traceback
of its own: after Ctrl-C or SIGTERM it raises in the agent, when the ranks have long said that they are saved.
"""

import socket
import sys
from pathlib import Path
from types import TracebackType

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousHandlerCreator
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

BACKEND = "bound"
TIMEOUT_SECONDS = 600


class BoundRendezvous(StaticTCPRendezvous):
    """The rendezvous of ``--master-addr``, except for where it listens."""

    def __init__(self, params: RendezvousParameters) -> None:
        """Take the endpoint and ``rank=``; on rank 0, listen.

        Raises:
            ValueError: ``--rdzv-conf=rank=`` is missing.
            SystemExit: the address is not one of this node's, or the port is taken.
        """
        address, port = parse_rendezvous_endpoint(params.endpoint, default_port=29500)
        rank = params.get_as_int("rank")
        if rank is None:
            raise ValueError("--rdzv-backend=bound needs --rdzv-conf=rank=<number of this node, from 0>")
        timeout = params.get_as_int("timeout", TIMEOUT_SECONDS)
        super().__init__(address, port, rank, params.max_nodes, params.run_id, timeout)
        if rank == 0:
            try:
                listener = socket.create_server((address, port))
            except OSError as error:
                sys.exit(
                    f"--rdzv-endpoint={address}:{port} cannot be opened on {socket.gethostname()}: {error.strerror}; "
                    "name an address of this node and a port that is free, the same on all nodes"
                )
            self._store = TCPStore(
                address,
                port,
                params.max_nodes,
                is_master=True,
                timeout=self.timeout,
                wait_for_workers=False,
                multi_tenant=True,
                master_listen_fd=listener.detach(),
            )

    def get_backend(self) -> str:
        """Return the name in --rdzv-backend."""
        return BACKEND


def build_bound_rendezvous(params: RendezvousParameters) -> RendezvousHandler:
    """Return the rendezvous of ``--rdzv-backend=bound``."""
    return BoundRendezvous(params)


LAUNCHERS = Path(__file__).resolve().parents[2] / "launch"


def bound_handler() -> RendezvousHandlerCreator:
    """Return the maker of ``--rdzv-backend=bound``; torchrun asks for it when it begins, whatever it runs."""
    if any(Path(arg).resolve().parent == LAUNCHERS for arg in sys.argv[1:]):
        sys.excepthook = leave_the_run_the_last_word
    return build_bound_rendezvous


def leave_the_run_the_last_word(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show what torchrun raises, unless it is that it was stopped by a signal."""
    if not issubclass(kind, SignalException):
        sys.__excepthook__(kind, error, trace)
