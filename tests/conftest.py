"""What all tests share."""

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import settings

from bigtrain.testing import ranks as local_ranks

# How long an example takes says nothing on a busy machine.
settings.register_profile("bigtrain", deadline=None)
settings.load_profile("bigtrain")

# Small tensors gain nothing from threads, and threads of several ranks wait for each other on few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# torch takes compiled code for instructions that it is told not to use (or the other way around) out of the same cache.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    cache = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}_{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)

# To ask torch whether there is a GPU, as test modules do, must not start CUDA: the server of ranks could not fork then.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# Ranks are forked from a server, and need not import what it has imported: inductor comes with DeepSpeed's optimizers.
# With a GPU, DeepSpeed would look for it there.
local_ranks.PRELOAD = (
    *local_ranks.PRELOAD,
    *("hydra", "accelerate", "torch._inductor.compile_fx", "bigtrain.run.trainer", "bigtrain.engine.native"),
    *("bigtrain.models.hf.build", "transformers.models.llama.modeling_llama", "transformers.models.bert.modeling_bert"),
    *("pytest", "tests.distributed.ranks"),
)
if not shutil.which("nvidia-smi"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    local_ranks.PRELOAD = (
        *local_ranks.PRELOAD,
        *("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.runtime.superoffload.superoffload_stage3"),
        *("deepspeed.module_inject.auto_ep_layer", "setuptools"),
    )


@pytest.fixture(scope="module", autouse=True)
def no_watchdog_is_left() -> Iterator[None]:
    """A run in this process leaves one that ends all tests minutes later, unless the process is said to outlive it."""
    yield
    from tests.distributed.launches import watchdogs_left

    assert not watchdogs_left(), "a run in this process: launching.run(..., outlived=True), or run_ranks"
