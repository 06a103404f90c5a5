"""Documents that share a sample do not see each other in models of transformers either, or the run is refused."""

import pytest
import torch

from bigtrain.config import DataConfig, ModelConfig, ModelKind, TrainConfig
from bigtrain.engine.build import require_causal
from bigtrain.errors import ConfigError
from bigtrain.models.hf.build import HFCausalLM, build_causal_lm
from bigtrain.models.probe import leak, two_documents
from bigtrain.tasks.base import TaskModel
from bigtrain.tasks.causal_lm import CausalLM

SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2)
DECODER = dict(SMALL, num_attention_heads=4, intermediate_size=48, max_position_embeddings=32)
GROUPED = dict(DECODER, num_key_value_heads=2)
KEPT_APART = {
    "LlamaConfig": GROUPED,
    "MistralConfig": dict(GROUPED, sliding_window=5),
    "Qwen2Config": GROUPED,
    "Qwen3Config": dict(GROUPED, head_dim=8),
    "MixtralConfig": dict(GROUPED, num_local_experts=4),
    "Gemma2Config": dict(GROUPED, head_dim=8, sliding_window=5),
    "Gemma3TextConfig": dict(GROUPED, head_dim=8, sliding_window=5),
    "GPTNeoXConfig": DECODER,
    "GPT2Config": dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=32),
    "OlmoConfig": GROUPED,
    "PhiConfig": GROUPED,
}
SEEN = {
    "MambaConfig": dict(SMALL, state_size=4),
    "BloomConfig": dict(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
}
DOCUMENTS = (9, 6, 5)


def built(name, settings):
    import transformers

    torch.manual_seed(0)
    return HFCausalLM(build_causal_lm(getattr(transformers, name)(**settings))).eval()


def across(model):
    positions_BT = two_documents(16, torch.device("cpu"))
    return leak(lambda tokens: model(tokens, None, positions_BT), 97, 16, torch.device("cpu"), from_later=False)


@pytest.mark.parametrize("name", KEPT_APART)
def test_a_document_is_computed_as_if_it_were_alone(name):
    model = built(name, KEPT_APART[name])
    tokens_T = torch.randint(97, (sum(DOCUMENTS),))
    positions_T = torch.cat([torch.arange(length) for length in DOCUMENTS])
    with torch.no_grad():
        together = model(tokens_T[None], None, positions_T[None])[0].split(DOCUMENTS)
        alone = [model(tokens[None])[0] for tokens in tokens_T.split(DOCUMENTS)]
        for mine, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    assert across(model) < 1e-5


@pytest.mark.parametrize("name", SEEN)
def test_what_sees_across_documents_is_refused(name):
    model = built(name, SEEN[name])
    assert across(model) > 1e-3

    class Engine:
        module, device = TaskModel(model, CausalLM()), torch.device("cpu")

    config = TrainConfig(
        model=ModelConfig(kind=ModelKind.hf, name="mine", vocab_size=97),
        data=DataConfig(document_mask=True, sequence_length=16),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bigtrain.engine.build.broadcast_json", lambda value: value)
        with pytest.raises(ConfigError, match=r"data\.document_mask=true, but model\.name=mine sees across documents"):
            require_causal(Engine, config)
        config.data.document_mask = False
        require_causal(Engine, config)


def test_the_halves_of_a_sample_are_documents():
    assert two_documents(8, torch.device("cpu")).tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]] * 2
