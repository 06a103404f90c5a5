import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from bigtrain.config import Activation, ModelConfig, Norm, Positions
from bigtrain.models import build_model
from bigtrain.models.document_mask import BLOCK_TOKENS, attend, build_document_mask

LLAMA = {"positions": Positions.rope, "norm": Norm.rmsnorm, "activation": Activation.swiglu, "bias": False}
CONFIGS = {"learned": {}, "rope, grouped": LLAMA | {"num_kv_heads": 2}}
LENGTHS = [[5, 9, 2], [16], [1, 1, 14]]
"""Lengths of the documents of each row."""


LONG = [[300, 20, 320], [1, 127, 128, 128], [256, 44], [640], [5]]
"""Lengths that begin and end inside of blocks of 128 tokens, at their borders, and in an incomplete one."""


@pytest.fixture(params=CONFIGS)
def model(request):
    shape = {"vocab_size": 50, "num_layers": 2, "hidden_dim": 32, "num_heads": 4, "max_positions": 16}
    return built(ModelConfig(**shape, **CONFIGS[request.param]))


def built(config):
    model = build_model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model


def packed():
    tokens, targets = torch.randint(50, (2, len(LENGTHS), 16), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    return tokens, targets, positions


def one_by_one(model, tokens):
    """Logits of every document by itself."""
    rows = [
        torch.cat([model(part[None])[0] for part in row.split(lengths)])
        for row, lengths in zip(tokens, LENGTHS, strict=True)
    ]
    return torch.stack(rows)


def test_documents_in_a_row_are_as_if_each_were_alone(model):
    tokens, _, positions = packed()
    torch.testing.assert_close(model(tokens, None, positions), one_by_one(model, tokens), rtol=1e-4, atol=1e-4)


def test_without_the_mask_they_are_not(model):
    tokens, _, _ = packed()
    different = (model(tokens) - one_by_one(model, tokens)).abs().amax(dim=-1) > 1e-3
    assert different[0, 5:].all() and not different[0, :5].any() and not different[1].any()


def test_one_document_is_what_it_is_without_a_mask(model):
    tokens, targets, _ = packed()
    positions = torch.arange(16).expand(3, 16)
    torch.testing.assert_close(model(tokens, targets, positions), model(tokens, targets), rtol=1e-5, atol=1e-5)


def gradients(model, *data):
    model.zero_grad()
    model(*data).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_activation_checkpointing_changes_nothing(model):
    data = packed()
    expected = gradients(model, *data)
    for block in model.blocks:
        inner = block.forward
        block.forward = lambda *args, inner=inner: checkpoint(inner, *args, use_reentrant=False)
    torch.testing.assert_close(gradients(model, *data), expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("lengths", LONG, ids=str)
def test_flex_attention_computes_the_same(lengths):
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    q, k, v = torch.randn(3, 1, 4, sum(lengths), 8, generator=torch.Generator().manual_seed(2))
    exact = attend(q, k[:, :2], v[:, :2], build_document_mask(positions, flex=False), dropout=0.0, gqa=True)
    flexible = attend(q, k[:, :2], v[:, :2], build_document_mask(positions, flex=True), dropout=0.0, gqa=True)
    torch.testing.assert_close(flexible, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", LONG, ids=str)
def test_only_blocks_that_hold_a_pair_are_computed(lengths):
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    pairs = build_document_mask(positions, flex=False)[0, 0]
    padding = -len(pairs) % BLOCK_TOKENS
    blocks = F.pad(pairs, (0, padding, 0, padding)).unflatten(0, (-1, BLOCK_TOKENS)).unflatten(2, (-1, BLOCK_TOKENS))
    mask = build_document_mask(positions, flex=True)
    torch.testing.assert_close(mask.to_dense()[0, 0].bool(), blocks.any(3).any(1))
    assert mask.full_kv_num_blocks.sum() == blocks.all(3).all(1).sum()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("lengths", [[1200], [500, 300, 400], [3, 700, 497]], ids=str)
@pytest.mark.parametrize("runs", [(0, 3), (1, 2)], ids=str)
def test_queries_of_some_tokens_see_what_they_see_among_all(lengths, runs):
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    whole = build_document_mask(positions, flex=False)
    rows = torch.cat([torch.arange(positions.shape[1]).chunk(4)[run] for run in runs])
    pairs = build_document_mask(positions, flex=False, rows=rows)
    assert torch.equal(pairs, whole[:, :, rows])
    blocks = F.pad(pairs[0, 0], (0, -1200 % BLOCK_TOKENS, 0, -600 % BLOCK_TOKENS))
    blocks = blocks.unflatten(0, (-1, BLOCK_TOKENS)).unflatten(2, (-1, BLOCK_TOKENS))
    mask = build_document_mask(positions, flex=True, rows=rows)
    computed = mask.to_dense()[0, 0].bool()
    assert (computed >= blocks.any(3).any(1)).all(), "no pair is left out"
    assert mask.full_kv_num_blocks.sum() <= blocks.all(3).all(1).sum()
    assert computed.sum() < computed.numel(), "and later blocks are"
    q, k, v = torch.randn(3, 1, 4, 1200, 8, generator=torch.Generator().manual_seed(2))
    exact = attend(q[:, :, rows], k[:, :2], v[:, :2], pairs, dropout=0.0, gqa=True)
    flexible = attend(q[:, :, rows], k[:, :2], v[:, :2], mask, dropout=0.0, gqa=True)
    torch.testing.assert_close(flexible, exact, rtol=1e-5, atol=1e-5)


@torch.no_grad()  # FlexAttention has no backward pass on a CPU
def test_compiled_blocks_share_one_graph_whatever_the_documents_are():
    from torch._dynamo.utils import counters

    model = built(ModelConfig(vocab_size=50, num_layers=3, hidden_dim=32, num_heads=2, max_positions=256))
    for block in model.blocks:
        block.compile(backend="aot_eager")
    torch.compiler.reset()
    counters.clear()
    for lengths in ([200, 56], [100, 100, 56], [256]):
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        compiled = exact = torch.randn(1, 256, 32, generator=torch.Generator().manual_seed(3))
        for block in model.blocks:
            compiled = block(compiled, None, None, build_document_mask(positions, flex=True))
            exact = block.forward(exact, None, None, build_document_mask(positions, flex=False))
        torch.testing.assert_close(compiled, exact, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
