"""torchrun whose rendezvous listens on one address: ``python launch/bound_torchrun.py ... launch/train.py ...``.

The store through which the ranks find each other has no authentication, and torchrun's own listens on every interface of
the first node. This one listens on the address in --rdzv-endpoint and nowhere else. All of torchrun's options are
understood; the world is fixed, as with --master-addr. On each of two nodes, with its own rank=<0 or 1>:

  python launch/bound_torchrun.py --nnodes=2 --nproc-per-node=8 --rdzv-backend=bound --rdzv-conf=rank=0 \\
      --rdzv-endpoint=10.0.0.1:29500 launch/train.py +model=gpt3_1b

The gradients' own connections are bound by NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME.
"""

import socket
import sys

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.run import main

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


rendezvous_handler_registry.register(BACKEND, build_bound_rendezvous)

if __name__ == "__main__":
    main()
