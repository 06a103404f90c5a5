"""The parity gate on one GPU: every engine computes what DDP computes there, and what a CPU computes."""

import pytest
import torch

from bigtrain.config import EngineKind
from bigtrain.testing.parity import Case, Trajectory, compare, compute
from tests.distributed.parity_test import GLOBAL_BATCH_SIZE, gate_config, wrapped_type

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none"),
]
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")


def case(engine: str, **environ: str) -> Case:
    """Return a case that accumulates two micro-batches; the reference computes them in one."""
    return Case(EngineKind[engine], 1, GLOBAL_BATCH_SIZE // 2, environ=environ)


@pytest.fixture(scope="module")
def reference() -> Trajectory:
    return compute(gate_config(), Case(EngineKind.ddp, 1, GLOBAL_BATCH_SIZE))


@pytest.mark.parametrize("engine", ENGINES)
def test_fp32_agrees_with_ddp(engine: str, reference: Trajectory):
    trajectory = compute(gate_config(), case(engine))
    assert trajectory.wrapped_type == wrapped_type(case(engine))
    difference = compare(trajectory, reference)
    print(engine, difference)
    assert difference.loss <= 1e-5
    assert difference.grad_norm <= 1e-5
    assert difference.parameters <= 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_mixed_precision_agrees_with_fp32(engine: str, reference: Trajectory):
    difference = compare(compute(gate_config("bf16"), case(engine)), reference)
    print(engine, difference)
    assert 0 < difference.loss <= 2e-3
    assert difference.grad_norm <= 2e-2


def test_a_gpu_computes_what_a_cpu_computes(reference: Trajectory):
    on_cpu = compute(gate_config(), case("ddp", CUDA_VISIBLE_DEVICES=""))
    difference = compare(on_cpu, reference)
    print(difference)
    assert 0 < difference.loss <= 1e-4
    assert difference.grad_norm <= 1e-4
