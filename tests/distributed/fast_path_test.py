"""What makes steps fast and small is in effect: one compilation for all blocks, gradients in DDP's buckets alone."""

from collections.abc import Iterator

import pytest
import torch

from bigtrain.data.read.batch import Batch
from bigtrain.testing.ranks import run_ranks
from tests.distributed.ranks import small_config, start_engine

NUM_STEPS = 3


def compilations(config):
    """Train some steps of two micro-batches; return how often what was compiled after each."""
    from torch._dynamo.utils import counters

    engine, counts = start_engine(config), []
    tokens = torch.randint(97, (2, 16))
    for _ in range(NUM_STEPS):
        engine.forward_backward([Batch(tokens=tokens, targets=tokens)] * 2, num_targets=torch.tensor(64.0))
        engine.step(1e-3)
        cache = counters["inductor"]
        counts.append((counters["stats"]["unique_graphs"], cache["fxgraph_cache_miss"], cache["fxgraph_cache_hit"]))
    return counts


@pytest.mark.slow
def test_twelve_blocks_are_compiled_once_and_kept_for_the_next_process(tmp_path):
    config = small_config("fsdp", model={"num_layers": 12}, compile=True)
    environ = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    cold, warm = (run_ranks(compilations, 1, config, timeout_seconds=280, environ=environ)[0] for _ in range(2))
    # The block, forward and backward.
    assert cold == [(1, 2, 0)] * NUM_STEPS
    assert warm == [(1, 0, 2)] * NUM_STEPS


def gradients_outside_of_buckets(config):
    """Return the wrapper, and how many gradients have memory of their own after each micro-batch of two steps.

    The first micro-batch of each step is not communicated.
    """
    engine, counts = start_engine(config), []
    tokens = torch.randint(97, (1, 16))

    class TwoMicroBatches(list[Batch]):
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                yield batch
                gradients = [parameter.grad for parameter in engine.module.parameters()]
                counts.append(sum(g.untyped_storage().nbytes() == g.nbytes for g in gradients))

    micro_batches = TwoMicroBatches([Batch(tokens=tokens, targets=tokens)] * 2)
    for _ in range(2):
        engine.forward_backward(micro_batches, num_targets=torch.tensor(32.0))
        engine.step(1e-3)
    return type(engine.module).__name__, counts


@pytest.mark.parametrize(
    ("world_size", "global_batch_size", "expected"),
    [
        (2, 4, ("DistributedDataParallel", [0] * 4)),
        (2, 2, ("DistributedDataParallel", [28, 0, 28, 0])),  # the engine does not expect to accumulate
        (1, 2, ("TaskModel", [28] * 4)),
    ],
)
def test_ddp_accumulates_in_its_buckets_and_needs_none_in_a_world_of_one(world_size, global_batch_size, expected):
    config = small_config("ddp")
    config.train.global_batch_size = global_batch_size
    found = run_ranks(gradients_outside_of_buckets, world_size, config, timeout_seconds=100)
    assert found == [expected] * world_size
