"""Muon on one process: torch's own with fused matrices taken apart, a polynomial of the singular values, bad steps."""

import math

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from bigtrain.config import OptimizerConfig, OptimizerKind
from bigtrain.engine.native import update_unless_bad
from bigtrain.optim.build import build_optimizer, parameter_groups
from bigtrain.optim.muon import COEFFICIENTS, NUM_ITERATIONS, Matrix, Muon, Rectangle, Workshop, newton_schulz, rounds

SHAPES = {
    "embed.weight": (50, 24),
    "blocks.0.qkv.weight": (40, 24),
    "blocks.0.up.weight": (96, 24),
    "blocks.0.down.weight": (24, 96),
    "blocks.0.up.bias": (96,),
    "blocks.1.qkv.weight": (40, 24),
}
FUSED = {"blocks.0.qkv.weight": (24, 8, 8), "blocks.1.qkv.weight": (24, 8, 8)}


def fresh(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def all_of(rows, columns):
    """All of a matrix on the only rank."""
    return ((Rectangle(0, 0, rows, columns),),)


def build(weights, *, dtype=torch.float32, lr=0.02):
    """Muon over ``weights``, told of its matrices as an engine would."""
    parameters = {name: torch.nn.Parameter(weight.clone()) for name, weight in weights.items()}
    config = OptimizerConfig(kind=OptimizerKind.muon, lr=lr)
    optimizer = build_optimizer(parameter_groups(parameters.items(), config), config)
    assert isinstance(optimizer, Muon)
    optimizer.workshop, optimizer.matrices = Workshop(device=torch.device("cpu"), dtype=dtype), {}
    for name, parameter in parameters.items():
        if name.startswith("blocks") and parameter.ndim == 2:
            begin, columns = 0, parameter.shape[1]
            for rows in FUSED.get(name, parameter.shape[:1]):
                matrix = Matrix(rows, columns, parameter, begin, all_of(rows, columns))
                optimizer.matrices.setdefault(parameter, []).append(matrix)
                begin += rows * columns
    return parameters, optimizer


def torchs_own(weights, *, lr=0.02):
    """torch.optim.Muon and AdamW over the same, with fused matrices as parameters of their own."""
    parts = {name: [*weight.split(FUSED.get(name, weight.shape[0]))] for name, weight in weights.items()}
    parts = {name: [torch.nn.Parameter(part.clone()) for part in some] for name, some in parts.items()}
    hidden = [p for name, some in parts.items() for p in some if name.startswith("blocks") and p.ndim == 2]
    vectors = [p for some in parts.values() for p in some if p.ndim == 1]
    muon = torch.optim.Muon(hidden, lr=lr, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": parts["embed.weight"], "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return parts, (muon, torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torchs_muon_with_adamw_for_the_rest(dtype, monkeypatch):
    if dtype == torch.float32:  # torch's own always computes in bf16: kept from it, both agree sharply
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    ours, optimizer = build(fresh(), dtype=dtype)
    theirs, optimizers = torchs_own(fresh())
    for step in range(5):
        gradients = fresh(step + 1)
        for name, parameter in ours.items():
            parameter.grad = gradients[name].clone()
            for part, gradient in zip(
                theirs[name], gradients[name].split(FUSED.get(name, len(gradients[name]))), strict=True
            ):
                part.grad = gradient.clone()
        for each in (optimizer, *optimizers):
            each.step()
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 1e-4}
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, torch.cat(theirs[name]), **tolerance)
        assert not torch.allclose(parameter, fresh()[name], atol=5e-3)  # twice the wider tolerance


def test_fused_matrices_are_not_one():
    ours, optimizer = build(fresh())
    whole, other = build(fresh())
    (qkv,) = (p for name, p in whole.items() if name == "blocks.0.qkv.weight")
    other.matrices[qkv] = [Matrix(40, 24, qkv, 0, all_of(40, 24))]
    for parameters, each in ((ours, optimizer), (whole, other)):
        for name, gradient in fresh(1).items():
            parameters[name].grad = gradient.clone()
        each.step()
    different = {name for name in ours if not torch.equal(ours[name], whole[name])}
    assert different == {"blocks.0.qkv.weight"}


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 16, 16)])
def test_newton_schulz_is_a_polynomial_of_the_singular_values(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(newton_schulz(x), u @ torch.diag_embed(s) @ vh, rtol=1e-9, atol=1e-9)
    for single in x:
        expected = _zeropower_via_newtonschulz(single, COEFFICIENTS, NUM_ITERATIONS, 1e-7)
        torch.testing.assert_close(newton_schulz(single[None].bfloat16())[0], expected, rtol=0, atol=2e-2)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("ask_host", [True, False])
def test_a_bad_gradient_changes_neither_weights_nor_momentum(ask_host, norm):
    parameters, optimizer = build(fresh())

    def step(norm, seed):
        for name, gradient in fresh(seed).items():
            parameters[name].grad = gradient * norm
        update_unless_bad(optimizer, torch.tensor(norm), ask_host=ask_host)
        state = [value for values in optimizer.state.values() for value in values.values()]
        return [tensor.detach().clone() for tensor in [*parameters.values(), *state]]

    good = step(1.0, 1)
    assert all(map(torch.equal, step(norm, 2), good))
    assert not any(map(torch.equal, step(1.0, 3), good))

    asked, other = build(fresh())
    for seed in (1, 3):
        for name, gradient in fresh(seed).items():
            asked[name].grad = gradient
        other.step()
    for name, parameter in asked.items():
        torch.testing.assert_close(parameters[name], parameter, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_owners", [1, 2, 8])
def test_every_matrix_is_in_one_round_and_owners_have_about_the_same_to_do(num_owners):
    holder = torch.empty(0)
    shapes = [(2048, 2048)] * 4 * 24 + [(8192, 2048), (2048, 8192)] * 24
    matrices = [Matrix(rows, columns, holder, 0, all_of(rows, columns)) for rows, columns in shapes]
    in_rounds = list(rounds(matrices, num_owners))
    assert sorted(id(m) for some in in_rounds for m in some) == sorted(map(id, matrices))
    costs = [sum(m.cost for some in in_rounds for m in some[owner::num_owners]) for owner in range(num_owners)]
    assert max(costs) == min(costs)
    largest = max(sum(m.rows * m.columns for m in some[::num_owners]) for some in in_rounds)
    assert largest == 2048 * 8192  # one of the largest at a time
