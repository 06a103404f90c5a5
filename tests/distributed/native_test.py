"""What the native engines communicate."""

import dataclasses

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from bigtrain.config import ParallelConfig
from bigtrain.config.layout import layout_of
from bigtrain.data.read.batch import Batch
from bigtrain.testing.ranks import run_ranks
from tests.distributed.ranks import small_config, start_engine

LAYERS = 3


class Collectives(TorchDispatchMode):
    """Counts them."""

    def __enter__(self):
        self.counts = {}
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def collectives(configs):
    """Return how many collectives of each kind the third step of every configuration begins."""
    counts = []
    for config in configs:
        engine = start_engine(config)
        if isinstance(engine.module, DistributedDataParallel):  # as if the model had one
            engine.module.modules_buffers = [torch.zeros(4)]
        tokens = torch.arange(16)[None]
        for _ in range(3):  # DDP agrees on its buckets in the second step
            with Collectives() as mode:
                engine.forward_backward([Batch(tokens=tokens, targets=tokens)], num_targets=32)
            engine.step(1e-3)
        counts.append(mode.counts)
    return counts


def test_a_micro_batch_communicates_no_more_than_it_has_to():
    model = {"num_layers": LAYERS}
    configs = [small_config("fsdp", model=model), small_config("ddp", model=model)]
    fsdp, ddp = run_ranks(collectives, 2, configs, timeout_seconds=100)[0]
    # The root and every block in the forward pass; in the backward pass neither the root nor the last block again.
    assert fsdp == {"_allgather_base_": 1 + LAYERS + LAYERS - 1, "_reduce_scatter_base_": 1 + LAYERS}
    assert "broadcast_" not in ddp, "buffers are alike on all ranks"


def exchanged(config):
    """Return how many collectives of each kind a micro-batch begins that is not the last one."""
    engine, tokens = start_engine(config), torch.arange(16)[None]
    with Collectives() as mode:
        engine.backward(Batch(tokens=tokens, targets=tokens), 32, is_last=False)
    return mode.counts


def test_ranks_that_share_matrices_exchange_tokens_twice_a_block_and_direction():
    config = small_config("ddp", model={"num_layers": LAYERS, "num_heads": 2})
    config.parallel.tp = 2
    counts = run_ranks(exchanged, 2, config, timeout_seconds=100)[0]
    # In front of attention, feed-forward and head, and behind attention, feed-forward and embedding; and back.
    each = 2 * (2 * LAYERS + 1)
    assert counts == {"_allgather_base_": each, "_reduce_scatter_base_": each, "allreduce_": 2}, "two for the loss"


def totals():
    """Return sums of two ranks that load the same samples, and of two that do not."""
    mesh = start_engine(small_config("ddp")).mesh
    copies = dataclasses.replace(mesh, dp_rank=0, dp_size=1, copies=2)
    whole = layout_of(small_config("fsdp").engine, ParallelConfig(), world_size=2, local_world_size=2)
    assert (mesh.dp_rank, mesh.dp_size, mesh.copies) == (mesh.rank, 2, 1) == (mesh.rank, whole.dp_size, whole.copies)
    count = 2**24 + 1  # more than fp32 can tell from its neighbour
    return [(m.total(torch.tensor(count)).item(), m.total(torch.tensor([1.5])).item()) for m in (copies, mesh)]


def test_ranks_that_load_the_same_samples_count_them_once():
    assert run_ranks(totals, 2, timeout_seconds=100)[0] == [(2**24 + 1, 1.5), (2**25 + 2, 3.0)]
