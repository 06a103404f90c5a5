"""One compilation serves all blocks, nothing is compiled again, and the next process finds it on disk."""

import torch

from bigtrain.config import ActivationCheckpointing
from bigtrain.data.batch import Batch
from bigtrain.local_ranks import run_ranks
from tests.distributed.ranks import small_config, start_engine

NUM_STEPS = 3


def compilations(config):
    """Train some steps of two micro-batches; return how often what was compiled after each."""
    from torch._dynamo.utils import counters

    engine, counts = start_engine(config), []
    tokens = torch.randint(97, (2, 16))
    for _ in range(NUM_STEPS):
        for last in (False, True):
            engine.micro_step(Batch(tokens, tokens), num_targets=torch.tensor(64.0), last=last)
        engine.step(1e-3)
        cache = counters["inductor"]
        counts.append((counters["stats"]["unique_graphs"], cache["fxgraph_cache_miss"], cache["fxgraph_cache_hit"]))
    return counts


def test_twelve_blocks_are_compiled_once_and_kept_for_the_next_process(tmp_path):
    recomputed = ActivationCheckpointing.full
    config = small_config("fsdp", model={"num_layers": 12}, compile=True, activation_checkpointing=recomputed)
    environ = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    cold, warm = (run_ranks(compilations, 1, config, timeout_seconds=280, environ=environ)[0] for _ in range(2))
    # The block, forward and backward.
    assert cold == [(1, 2, 0)] * NUM_STEPS
    assert warm == [(1, 0, 2)] * NUM_STEPS
