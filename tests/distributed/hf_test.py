"""Models of the Llama family, our own and transformers', train under every kind of engine with the same numbers."""

import dataclasses

import pytest

from bigtrain.checks import resolve
from bigtrain.config import Activation, EngineKind, ModelConfig, ModelKind, Norm, Positions
from bigtrain.models.hf import with_hf_shape
from bigtrain.parity import Case, compare, compute
from tests.distributed.ranks import small_config


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory):
    """A directory with the config.json of a small Llama with tied embeddings and rotary buffers."""
    from transformers import LlamaConfig

    directory = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    ).save_pretrained(directory)
    return directory


LLAMA = {
    "positions": Positions.rope,
    "norm": Norm.rmsnorm,
    "activation": Activation.swiglu,
    "bias": False,
    "tie_embeddings": False,
    "num_heads": 4,
    "num_kv_heads": 2,
}


@pytest.mark.parametrize("kind", list(ModelKind), ids=lambda kind: kind.name)
def test_engines_agree_on_a_llama(kind, tiny_llama):
    config = small_config(model=LLAMA)
    if kind is ModelKind.hf:
        model = with_hf_shape(ModelConfig(kind=ModelKind.hf, name=str(tiny_llama)))
        assert (model.num_layers, model.max_positions, model.num_kv_heads) == (2, 16, 2)
        config = resolve(dataclasses.replace(small_config(), model=model))
    reference = compute(config, Case(EngineKind.ddp, 1, 8))
    assert reference.losses[-1] < reference.losses[0]
    for engine in (EngineKind.fsdp, EngineKind.zero3):
        difference = compare(compute(config, Case(engine, 2, 2)), reference)
        print(engine, difference)
        assert max(difference.loss, difference.grad_norm) <= 1e-5
        assert difference.parameters <= 1e-4
