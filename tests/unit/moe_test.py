"""A mixture of experts computes what its formula says, is counted right, and is the Mixtral or Qwen3 of transformers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers

from bigtrain.config import Activation, ModelConfig, Norm, Positions, RouterScores, TrainConfig
from bigtrain.config.check import check, resolve
from bigtrain.config.moe import MoeConfig
from bigtrain.errors import ConfigError
from bigtrain.models import build_initial_values, build_model
from bigtrain.models.hf.native import family_of, hf_config, hf_tensors
from bigtrain.models.moe import MixtureOfExperts, balances
from bigtrain.models.sizes import model_sizes, visited_weights
from tests.modules import initialise

SHAPE = dict(
    vocab_size=97, num_layers=3, hidden_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, max_positions=16,
    positions=Positions.rope, norm=Norm.rmsnorm, activation=Activation.swiglu, bias=False, tie_embeddings=False,
)  # fmt: skip
TOKENS_BT = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))


def config(moe=None, **changes):
    settings = {"num_experts": 4, "expert_dim": 24} | (moe or {})
    return resolve(TrainConfig(model=ModelConfig(**{**SHAPE, "moe": MoeConfig(**settings), **changes}))).model


def mixture(**settings):
    torch.manual_seed(0)
    made = MixtureOfExperts(8, MoeConfig(**{"num_experts": 4, "expert_dim": 8, **settings}), 0.0, None)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def by_formula(moe, x_BTD):
    """Each token through its experts, one by one; and the loss of each sequence."""
    settings = moe.router.moe
    outputs, losses = torch.zeros_like(x_BTD), []
    for b, sequence in enumerate(x_BTD):
        logits = sequence @ moe.router.weight.T
        scores = logits.softmax(-1) if settings.scores is RouterScores.softmax else logits.sigmoid()
        chosen = (scores + moe.router.balance).topk(settings.experts_per_token).indices
        used = torch.zeros(settings.num_experts)
        rows = []
        for t, token in enumerate(sequence):
            weights = scores[t, chosen[t]] / scores[t, chosen[t]].sum()
            parts = []
            for weight, e in zip(weights, chosen[t], strict=True):
                used[e] += 1
                gate, up, down = moe.experts.gate[e], moe.experts.up[e], moe.experts.down[e]
                parts.append(weight * (down @ (F.silu(gate @ token) * (up @ token))))
            rows.append(sum(parts))
        outputs[b] = torch.stack(rows)
        shares = (scores / scores.sum(-1, keepdim=True)).mean(0)
        losses.append((used * settings.num_experts / (settings.experts_per_token * len(sequence)) * shares).sum())
    return outputs, losses


@pytest.mark.parametrize("scores", RouterScores)
@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_each_token_goes_through_its_experts(scores, bias):
    moe, x = mixture(scores=scores), torch.randn(2, 5, 8)
    moe.router.balance[1] = bias
    expected = by_formula(moe, x)[0]
    torch.testing.assert_close(moe(x), expected)
    moe.router.balance[1] = 0.0
    assert torch.allclose(moe(x), expected, atol=1e-4) == (bias == 0), "the biases choose"


@pytest.mark.parametrize("scores", RouterScores)
def test_the_gradient_is_that_of_the_loss_per_sequence_too(scores):
    moe, x = mixture(scores=scores, sequence_balance=0.3), torch.randn(3, 5, 8)
    num_targets = torch.tensor([5, 3, 0])  # the last is padding
    outputs, losses = by_formula(moe, x)
    total = sum(n * loss for n, loss in zip(num_targets, losses, strict=True))
    ((outputs**2).sum() / 8 + 0.3 * total / 8).backward()
    expected = moe.router.weight.grad.clone()
    moe.zero_grad()
    moe.router.loss_scale = 1 / 8
    ((moe(x, num_targets) ** 2).sum() / 8).backward()
    torch.testing.assert_close(moe.router.weight.grad, expected)
    assert moe.router.counts.sum() == 2 * 5 * 2, "two sequences of five tokens, each with two experts"
    moe.zero_grad()
    ((moe(x) ** 2).sum() / 8).backward()
    assert not torch.allclose(moe.router.weight.grad, expected), "it is the loss that is compared"


@pytest.mark.parametrize("changes", [{}, {"num_shared_experts": 2, "dense_layers": 1}])
def test_parameters_and_visited_weights_are_counted(changes):
    model = config(changes, qk_norm=True)
    with torch.device("meta"):
        built = build_model(model)
    assert model_sizes(model).total == sum(p.numel() for p in built.parameters())
    every = sum(p.numel() for n, p in built.named_parameters() if "blocks" in n and p.ndim > 1)
    num_mixtures = model.num_layers - model.moe.dense_layers
    assert visited_weights(model) == every - num_mixtures * 2 * 3 * 32 * 24


@pytest.mark.parametrize(
    ("family", "model"),
    [
        ("mixtral", config()),
        ("qwen3_moe", config({"dense_layers": 1}, qk_norm=True)),
        ("qwen3", config(moe=None, qk_norm=True) and dataclasses.replace(config(qk_norm=True), moe=None)),
    ],
)
def test_transformers_computes_the_same_from_the_exported_tensors_and_back(family, model, tmp_path):
    network = build_model(model)
    initialise(network, build_initial_values(model, seed=1))
    assert family_of(model).name == family
    described = transformers.AutoConfig.for_model(**hf_config(model))
    theirs = transformers.AutoModelForCausalLM.from_config(described).eval()
    theirs.save_pretrained(tmp_path)
    parameters = dict(network.named_parameters())
    tensors = {
        tensor.name: tensor.cut_from(parameters[tensor.native]).clone().contiguous() for tensor in hf_tensors(model)
    }
    from safetensors.torch import load_file, save_file

    assert tensors.keys() == load_file(tmp_path / "model.safetensors").keys(), "names are those on disk"
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(TOKENS_BT), loaded(TOKENS_BT).logits, atol=1e-5, rtol=1e-5)
    continued = dataclasses.replace(model, init_from=str(tmp_path))
    again = build_model(continued)
    initialise(again, build_initial_values(continued, seed=2))
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
    if model.moe:
        other = dataclasses.replace(continued, moe=dataclasses.replace(model.moe, experts_per_token=1))
        with pytest.raises(ConfigError, match="experts_per_token"):
            build_initial_values(other, seed=2)


def test_what_transformers_has_not_is_named():
    with pytest.raises(ConfigError, match=r"balance_speed.*no biases of the choice"):
        family_of(config({"balance_speed": 1e-3}))
    with pytest.raises(ConfigError, match="num_shared_experts"):
        family_of(config({"num_shared_experts": 1}))


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (config(bias=True), "model.moe: experts are SwiGLU networks without biases"),
        (config({"experts_per_token": 5}), "model.moe.experts_per_token=5: there are model.moe.num_experts=4"),
        (config({"dense_layers": 3}), "model.moe.dense_layers=3: no mixture is left"),
        (config({"expert_dim": 20}), "model.moe.expert_dim=20: grouped products want a multiple of 8"),
    ],
)
def test_contradictions_are_told(model, sentence):
    problems = check(resolve(TrainConfig(model=model)), world_size=1, local_world_size=1)
    assert any(problem.startswith(sentence) for problem in problems), problems


def test_biases_begin_at_zero_and_have_names():
    model = config()
    with torch.device("meta"):
        network = build_model(model)
    assert list(balances(network)) == [f"blocks.{i}.feed_forward.router.balance" for i in range(3)]
    values = build_initial_values(model, seed=0)
    assert all(values[name].value == 0 for name in balances(network))
