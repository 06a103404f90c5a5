"""Which numbers of which matrices become 0."""

import pytest
import torch

from bigtrain.config import ModelConfig, ModelKind
from bigtrain.errors import ConfigError
from bigtrain.models import build_model
from bigtrain.models.pruning import input_dims, prunable, two_of_four, without_smallest
from tests.distributed.ranks import small_config


def on_meta(model):
    with torch.device("meta"):
        return build_model(model)


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 2, 2)])
def test_the_smallest_are_left_out_and_of_equal_ones_the_first(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    pruned = without_smallest(weight, 0.4)
    kept = pruned != 0
    assert int((~kept).sum()) == round(0.4 * weight.numel()) and torch.equal(pruned[kept], weight[kept])
    assert weight[~kept].abs().max() <= weight[kept].abs().min()
    assert without_smallest(torch.full((2, 3), -1.0), 0.5).tolist() == [[0, 0, 0], [-1, -1, -1]]


@pytest.mark.parametrize("inputs", [0, 1])
def test_of_every_four_inputs_two_are_left(inputs):
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    fours = two_of_four(weight, inputs).movedim(inputs, -1).unflatten(-1, (-1, 4))
    assert ((fours == 0).sum(dim=-1) == 2).all()
    whole = weight.movedim(inputs, -1).unflatten(-1, (-1, 4))
    assert torch.equal(fours.abs().sum(dim=-1), whole.abs().topk(2, dim=-1).values.sum(dim=-1))


def test_embeddings_heads_and_vectors_are_left_alone_unless_they_are_named():
    decoder = on_meta(small_config(model={"tie_embeddings": False}).model)
    names = prunable(decoder, [])
    assert names and all(
        name.startswith("blocks.") and name.endswith("weight") and "norm" not in name for name in names
    )
    assert prunable(decoder, [], frozen=names[:2]) == names[2:]
    assert len(prunable(decoder, ["*"])) == len(names) + 3  # tokens, positions, head
    cnn = on_meta(ModelConfig(name="cnn", kind=ModelKind.own, settings={"image_size": 8}))
    shapes = [tuple(cnn.get_parameter(name).shape)[:2] for name in prunable(cnn, [])]
    assert shapes == [(32, 1), (64, 32), (64, 64), (64, 256)]
    with pytest.raises(ConfigError, match="no_such"):
        prunable(decoder, ["no_such*"])


def test_inputs_of_gpt2_of_transformers_are_rows():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    dims = input_dims(model)
    assert dims["transformer.h.0.attn.c_attn.weight"] == 0 and dims["lm_head.weight"] == 1
    assert all(name.startswith("transformer.h.0.") for name in prunable(model, []))
