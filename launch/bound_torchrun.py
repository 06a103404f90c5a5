"""torchrun whose rendezvous listens on one address: ``python launch/bound_torchrun.py ... launch/train.py ...``.

The store through which the ranks find each other has no authentication, and torchrun's own listens on every interface of
the first node. This one listens on the address in --rdzv-endpoint and nowhere else. All of torchrun's options are
understood; the world is fixed, as with --master-addr. On each of two nodes, with its own rank=<0 or 1>:

  python launch/bound_torchrun.py --nnodes=2 --nproc-per-node=8 --rdzv-backend=bound --rdzv-conf=rank=0 \\
      --rdzv-endpoint=10.0.0.1:29500 launch/train.py +model=gpt3_1b

The gradients' own connections are bound by NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME.
"""

from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
from torch.distributed.run import main

from bigtrain.distributed.torchrun import BACKEND, build_bound_rendezvous

rendezvous_handler_registry.register(BACKEND, build_bound_rendezvous)

if __name__ == "__main__":
    main()
