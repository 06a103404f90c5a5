"""What torchrun itself takes of this package: by the entry point ``torchrun.handlers``, or as ``python -m``.

A rendezvous that listens on one address. The store through which the ranks find each other has no authentication, and
torchrun's own listens on every interface of the first node; this one on the address in --rdzv-endpoint and nowhere
else. All of torchrun's options are understood; the world is fixed, as with --master-addr. On each of two nodes, with
its rank:

  python -m bigtrain.distributed.torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=bound --rdzv-conf=rank=0 \
      --rdzv-endpoint=10.0.0.1:29500 -m bigtrain train +model=gpt3_1b

The gradients' own connections are bound by NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME.

And silence where torchrun would show, below the run's last word, a traceback of its own: after Ctrl-C or SIGTERM it
raises in the agent, when the ranks have long said that they are saved.
"""

import socket
import sys
from pathlib import Path
from types import TracebackType

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.api import RendezvousHandlerCreator
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

BACKEND = "bound"
TIMEOUT_SECONDS = 600


class BoundRendezvous(StaticTCPRendezvous):
    """The rendezvous of ``--master-addr``, except for where it listens."""

    def __init__(self, params: RendezvousParameters) -> None:
        """Take the endpoint and ``rank=``; on rank 0, listen."""
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
        return BACKEND


def build_bound_rendezvous(params: RendezvousParameters) -> RendezvousHandler:
    """Return the rendezvous of ``--rdzv-backend=bound``."""
    return BoundRendezvous(params)


def bound_handler() -> RendezvousHandlerCreator:
    """Return the maker of ``--rdzv-backend=bound``; torchrun asks for it when it begins, whatever it runs."""
    launchers = Path(__file__).resolve().parents[2] / "launch"
    if any(arg == "bigtrain" or Path(arg).resolve().parent == launchers for arg in sys.argv[1:]):
        sys.excepthook = leave_the_run_the_last_word
    return build_bound_rendezvous


def leave_the_run_the_last_word(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show what torchrun raises, unless it is that it was stopped by a signal."""
    if not issubclass(kind, SignalException):
        sys.__excepthook__(kind, error, trace)


if __name__ == "__main__":
    from torch.distributed.run import main

    from bigtrain.distributed import torchrun  # the one that the entry point, where it is installed, has registered

    rendezvous_handler_registry.register(BACKEND, torchrun.build_bound_rendezvous)
    main()
