"""The model under the engines' own wrappers, at a world of one: same losses as without them."""

import multiprocessing
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from bigtrain.config import Activation, ModelConfig, ModelKind, Norm, Positions
from bigtrain.models import build_model
from bigtrain.models.init import initial_values
from tests.modules import initialise, materialise

GPT = ModelConfig(vocab_size=97, num_layers=2, hidden_dim=32, num_heads=4, max_positions=16, init_std=0.1)
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
NUM_STEPS = 3


def meta_model(config):
    with torch.device("meta"):
        model = build_model(config)
    return model, initial_values(model, config, seed=0)


def ready(config):
    model, values = meta_model(config)
    materialise(model, torch.device("cpu"))
    initialise(model, values)
    return model


def losses(model, optimizer):
    result = []
    for _ in range(NUM_STEPS):
        loss = model(TOKENS_BT, TOKENS_BT.roll(-1, 1)) / TOKENS_BT.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        result.append(loss.item())
    return result


def plain_losses(config):
    model = ready(config)
    return losses(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


@pytest.fixture
def world_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def hf_tied(tmp_path):
    import transformers

    transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.1,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path / "hf")
    return ModelConfig(kind=ModelKind.hf, name=str(tmp_path / "hf"))


def fsdp_model(config, **options):
    """Built on meta, sharded, given memory, filled: the order of a real run."""
    model, values = meta_model(config)
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    materialise(model, torch.device("cpu"))
    with torch.no_grad():
        for name, param in model.named_parameters():
            local = param.to_local()
            values[name].fill(0, local.view(-1))
    return model


@pytest.mark.parametrize("family", ["gpt", "llama", "hf tied"])
def test_fsdp_from_meta_has_the_plain_losses(family, world_of_one, hf_tied):
    config = {"gpt": GPT, "llama": LLAMA, "hf tied": hf_tied}[family]
    model = fsdp_model(config)
    sharded = losses(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    assert sharded == pytest.approx(plain_losses(config), rel=1e-6)
    assert sharded[-1] < sharded[0] - 0.1


def test_rotary_angles_stay_fp32_under_fsdp_mixed_precision(world_of_one):
    model = fsdp_model(LLAMA, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False))
    seen = []
    model.blocks[1].attention.register_forward_pre_hook(lambda module, args: seen.extend(args[:2]))
    loss = model(TOKENS_BT, TOKENS_BT.roll(-1, 1))
    x_BTD, rope_TK = seen
    assert x_BTD.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert (rope_TK[3, 0] - torch.tensor(3.0).cos()).abs() < 1e-6


def zero3_losses(configs, rendezvous, queue, rank=0, world_size=1):
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled
    deepspeed.init_distributed("gloo")
    settings = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,  # by default DeepSpeed clips at 1
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,  # gather every parameter anew at every use
            "memory_efficient_linear": False,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    for config in configs:
        model = ready(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        assert all(param.numel() == 0 for param in engine.module.parameters())
        result = []
        for _ in range(NUM_STEPS):
            loss = engine(TOKENS_BT, TOKENS_BT.roll(-1, 1)) / TOKENS_BT.numel()
            engine.backward(loss)
            engine.step()
            result.append(loss.item())
        queue.put(result)


def test_zero3_has_the_plain_losses(tmp_path, hf_tied):
    configs = [GPT, LLAMA, hf_tied]
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=zero3_losses, args=(configs, tmp_path / "rendezvous", queue))
    process.start()
    process.join(timeout=100)
    assert process.exitcode == 0
    for config in configs:
        assert queue.get(timeout=5) == pytest.approx(plain_losses(config), rel=1e-6)
