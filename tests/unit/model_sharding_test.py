"""The model under FSDP's mixed precision."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from bigtrain.config import Activation, ModelConfig, Norm, Positions
from bigtrain.models import build_model, initial_values
from tests.modules import initialise, materialise

LLAMA = ModelConfig(
    vocab_size=97,
    num_layers=2,
    hidden_dim=32,
    num_heads=4,
    num_kv_heads=2,
    max_positions=16,
    positions=Positions.rope,
    norm=Norm.rmsnorm,
    activation=Activation.swiglu,
    bias=False,
    tie_embeddings=False,
    init_std=0.1,
)
TOKENS_BT = torch.randint(97, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def world_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_rotary_angles_stay_fp32(world_of_one):
    with torch.device("meta"):
        model = build_model(LLAMA)
    values = initial_values(model, LLAMA, seed=0)
    materialise(model, torch.device("cpu"))
    initialise(model, values)
    options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)}
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    seen = []
    model.blocks[1].attention.register_forward_pre_hook(lambda module, args: seen.extend(args[:2]))
    loss = model(TOKENS_BT, TOKENS_BT.roll(-1, 1))
    x_BTD, rope_TK = seen
    assert x_BTD.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert (rope_TK[3, 0] - torch.tensor(3.0).cos()).abs() < 1e-6
