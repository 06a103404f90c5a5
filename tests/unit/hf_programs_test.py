"""From scratch, a model of transformers starts from what its own code would have drawn."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.models.hf.build import HFCausalLM, build_causal_lm
from bigtrain.models.hf.values import fresh_values
from bigtrain.models.init import BLOCK_ELEMENTS
from bigtrain.models.programs import Program, Step, recorded_values

SMALL = dict(vocab_size=384, hidden_size=64, num_hidden_layers=2)
DECODER = dict(SMALL, num_attention_heads=4, intermediate_size=128, max_position_embeddings=32)


def config_of(family):
    import transformers as hf

    return {
        "padding row": lambda: hf.LlamaConfig(**DECODER, pad_token_id=5),
        "tied to a padding row": lambda: hf.Gemma3TextConfig(**DECODER, num_key_value_heads=2, head_dim=16),
        "orthogonal": lambda: hf.RwkvConfig(**SMALL, attention_hidden_size=64),
        "uniform": lambda: hf.MambaConfig(**SMALL, state_size=4),
        "by depth": lambda: hf.GPT2Config(vocab_size=384, n_embd=64, n_layer=2, n_head=4, n_positions=32),
        "experts": lambda: hf.MixtralConfig(**DECODER, num_key_value_heads=2, num_local_experts=4),
    }[family]()


def moments(flat):
    return (flat == 0).sum().item(), flat.mean().item(), flat.std(correction=0).item()


def unlike(mine, theirs, numel):
    """Whether two samples of ``numel`` numbers are of different distributions, by six standard errors."""
    (zeros, mean, std), (other_zeros, other_mean, other_std) = mine, theirs
    error = 6 * max(std, other_std) * math.sqrt(2 / numel) + 1e-7
    return zeros != other_zeros or abs(mean - other_mean) > error or abs(std - other_std) > error


@pytest.mark.parametrize(
    "family", ["padding row", "tied to a padding row", "orthogonal", "uniform", "by depth", "experts"]
)
def test_values_are_distributed_as_those_of_transformers(family):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = HFCausalLM(build_causal_lm(config_of(family)))
    values = fresh_values(model, seed=0)
    torch.manual_seed(1)
    theirs = dict(AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32).named_parameters())
    assert values.keys() == {f"causal_lm.{name}" for name in theirs}
    wrong = []
    for name, parameter in theirs.items():
        flat = torch.empty(parameter.numel())
        values[f"causal_lm.{name}"].fill(0, flat)
        if unlike(moments(flat), moments(parameter.detach().flatten()), flat.numel()):
            wrong.append(name)
    assert wrong == []


def test_another_deviation_would_be_noticed():
    torch.manual_seed(0)
    assert unlike(moments(torch.randn(4096)), moments(1.2 * torch.randn(4096)), 4096)
    assert not unlike(moments(torch.randn(4096)), moments(torch.randn(4096)), 4096)


STEPS = (Step("uniform_", (-0.5, 0.5), 0, 200_000), Step("mul_", (2,), 0, 200_000), Step("zero_", (), 70_000, 70_100))


@given(start=st.integers(0, 199_999), length=st.integers(1, 90_000))
def test_any_part_is_that_of_the_whole(start, length):
    program, whole = Program(STEPS, 3, "weight"), torch.empty(200_000)
    program.fill(0, whole)
    part = torch.empty(min(length, 200_000 - start))
    program.fill(start, part)
    assert torch.equal(part, whole[start : start + len(part)])
    assert (whole[70_000:70_100] == 0).all() and 0.9 < whole.max() <= 1 and (whole == 0).sum() < 110
    assert not torch.equal(whole[:100], whole[BLOCK_ELEMENTS : BLOCK_ELEMENTS + 100])


def test_what_is_no_such_program_is_left_to_the_code_itself():
    layer = torch.nn.Linear(4, 4, device="meta")

    def initialise():
        layer.weight.normal_(0, 0.02)
        layer.weight.t()[1].fill_(3)  # a column
        layer.bias.zero_()

    assert recorded_values(layer, initialise, 0).keys() == {"bias"}
