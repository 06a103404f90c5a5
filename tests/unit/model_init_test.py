import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config import Activation, ModelConfig, Norm, Positions
from bigtrain.models import build_model, initial_values
from bigtrain.models.init import BLOCK_ELEMENTS, Constant, Normal
from tests.modules import initialise, materialise

GPT = ModelConfig(vocab_size=500, num_layers=3, hidden_dim=64, num_heads=4, max_positions=100, init_std=0.05)
LLAMA = ModelConfig(
    vocab_size=500,
    num_layers=3,
    hidden_dim=64,
    num_heads=4,
    num_kv_heads=2,
    positions=Positions.rope,
    norm=Norm.rmsnorm,
    activation=Activation.swiglu,
    bias=False,
    tie_embeddings=False,
)


def whole(value, numel):
    out = torch.empty(numel)
    value.fill(0, out)
    return out


NORMAL = Normal(0.02, 0, "blocks.0.attention.qkv.weight")
NUMEL = 3 * BLOCK_ELEMENTS + 123
FULL = whole(NORMAL, NUMEL)


@settings(deadline=None)
@given(start=st.integers(0, NUMEL), length=st.integers(0, BLOCK_ELEMENTS + 5))
def test_any_slice_is_that_slice_of_the_whole(start, length):
    length = min(length, NUMEL - start)
    out = torch.full((length + 2,), 7.0)
    NORMAL.fill(start, out[1:-1])
    assert torch.equal(out[1:-1], FULL[start : start + length])
    assert out[0] == out[-1] == 7.0


@pytest.mark.parametrize("start", [0, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1])
def test_slices_across_block_borders(start):
    for stop in (start, start + 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 2 * BLOCK_ELEMENTS, NUMEL):
        if stop >= start:
            out = torch.empty(stop - start)
            NORMAL.fill(start, out)
            assert torch.equal(out, FULL[start:stop])


@pytest.mark.parametrize("other", [Normal(0.02, 1, NORMAL.fqn), Normal(0.02, 0, "blocks.1.attention.qkv.weight")])
def test_seed_and_name_decide(other):
    correlation = torch.corrcoef(torch.stack([FULL, whole(other, NUMEL)]))[0, 1]
    assert abs(correlation) < 0.01
    blocks = FULL[: 3 * BLOCK_ELEMENTS].view(3, -1)
    assert (torch.corrcoef(blocks) - torch.eye(3)).abs().max() < 0.02


def test_numbers_are_normal():
    scaled = FULL.double() / 0.02
    assert abs(scaled.mean()) < 0.01 and abs(scaled.std() - 1) < 0.01
    inside = [(scaled.abs() < sigma).double().mean().item() for sigma in (1, 2, 3)]
    assert inside == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.005)


def test_threads_and_the_global_generator_do_not_matter():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    outs = [torch.empty(NUMEL) for _ in range(4)]
    threads = [threading.Thread(target=NORMAL.fill, args=(0, out)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, FULL) for out in outs)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
def test_rules_of_the_native_model(config):
    with torch.device("meta"):
        model = build_model(config)
    values = initial_values(model, config, seed=0)
    params = dict(model.named_parameters())
    assert list(values) == list(params)
    for name, value in values.items():
        if name.endswith("bias"):
            assert value == Constant(0.0)
        elif "norm" in name:
            assert value == Constant(1.0)
        else:
            residual = name.endswith(("attention.out.weight", "feed_forward.down.weight"))
            std = config.init_std / (6**0.5 if residual else 1)
            assert whole(value, params[name].numel()).std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt", "llama"])
def test_materialise_and_initialise_leave_nothing_out(config):
    with torch.device("meta"):
        model = build_model(config)
    values = initial_values(model, config, seed=3)
    materialise(model, torch.device("cpu"))
    for param in model.parameters():
        torch.nn.init.constant_(param, float("nan"))
    initialise(model, values)
    for name, param in model.named_parameters():
        assert torch.equal(param.flatten(), whole(values[name], param.numel())) and param.requires_grad


def test_materialise_keeps_ties_and_buffers():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.register_buffer("table", torch.arange(3), persistent=False)
    materialise(model, torch.device("cpu"))
    assert model[1].weight is model[0].weight and not model[0].weight.is_meta
    assert torch.equal(model.table, torch.arange(3)) and "table" not in model.state_dict()
