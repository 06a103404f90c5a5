import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from bigtrain.config import DataConfig, EngineConfig, EngineKind, ModelConfig, ModelKind, Precision, TrainConfig
from bigtrain.engine import build
from bigtrain.errors import ConfigError
from bigtrain.models import build_model, probe
from bigtrain.models.hf.build import build_causal_lm
from bigtrain.models.probe import (
    HiddenBackwardError,
    leak,
    longest_sample,
    outermost,
    require_positions,
    unreached_parameters,
)
from bigtrain.tasks.base import TaskModel
from bigtrain.tasks.causal_lm import CausalLM

SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
ROTARY = dict(SMALL, num_key_value_heads=2, max_position_embeddings=32)
TEXT = dict(ROTARY, head_dim=8)
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
)


def written(config, directory):
    config.save_pretrained(directory)
    return ModelConfig(kind=ModelKind.hf, name=str(directory))


def on_meta(config, directory):
    with torch.device("meta"):
        return build_model(written(config, directory))


# Which parameters the loss reaches


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**ROTARY),
        transformers.MixtralConfig(**ROTARY, num_local_experts=4),
        transformers.OlmoeConfig(**ROTARY, num_experts=4, num_experts_per_tok=2),
        transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4),
        transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4),
        transformers.Gemma2Config(**TEXT),
    ],
    ids=lambda config: config.model_type,
)
def test_the_loss_reaches_every_parameter(config, tmp_path):
    assert unreached_parameters(on_meta(config, tmp_path)) == []


def test_a_tower_for_images_is_not_reached_and_not_the_blocks(tmp_path):
    model = on_meta(transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4), tmp_path)
    assert len(model.blocks) == 3, "before anybody has looked, the longest list"
    names = unreached_parameters(model)
    assert {name.split(".")[2] for name in names} == {"vision_tower", "multi_modal_projector"}
    of_text = [name for name, _ in model.named_parameters() if ".language_model." in name]
    assert len(names) + len(of_text) == len(list(model.parameters()))
    assert outermost(model, names) == ["causal_lm.model.vision_tower", "causal_lm.model.multi_modal_projector"]
    build.freeze_unreached(model, TrainConfig())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == names
    assert len(model.blocks) == 2


def test_cross_attention_of_a_decoder_alone_is_named_in_few_words(tmp_path):
    config = transformers.BartConfig(
        vocab_size=97, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48
    )
    model = on_meta(config, tmp_path)
    prefix = "causal_lm.model.decoder.layers.*.encoder_attn"
    assert outermost(model, unreached_parameters(model)) == [prefix, f"{prefix}_layer_norm"]


def test_a_model_that_cannot_be_run_dry_is_said_to_be_so_and_trained(tmp_path, caplog):
    class Counts(torch.nn.Linear):
        vocab_size, causal_lm = 4, SimpleNamespace(config=transformers.LlamaConfig())

        def forward(self, tokens_BT):
            return super().forward(torch.ones(int(self.weight.abs().sum().tolist()), 2)), tokens_BT

    with torch.device("meta"):
        model = Counts(2, 2)
    with pytest.raises(NotImplementedError):
        unreached_parameters(model)
    build.freeze_unreached(model, TrainConfig())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("shape", [(2, 4), (4, 4)], ids=["of any length", "of one length"])
def test_reversible_layers_are_not_taken_for_unreached_ones(shape, tmp_path):
    settings = dict(SMALL, is_decoder=True, attn_layers=["local", "local"], axial_pos_embds_dim=[16, 16])
    config = transformers.ReformerConfig(**settings, axial_pos_shape=shape)
    model, length = on_meta(config, tmp_path), shape[0] * shape[1]
    with pytest.raises(HiddenBackwardError, match="_ReversibleFunctionBackward"):
        unreached_parameters(model, length)
    ddp, zero2 = (
        TrainConfig(engine=EngineConfig(kind=kind), data=DataConfig(sequence_length=length))
        for kind in (EngineKind.ddp, EngineKind.zero2)
    )
    with pytest.raises(ConfigError, match="engine=ddp: this model computes gradients in a backward pass of its own"):
        build.freeze_unreached(model, ddp)
    build.freeze_unreached(model, zero2)
    assert all(p.requires_grad for p in model.parameters())


def test_a_dry_run_leaves_the_model_as_it_is(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = on_meta(transformers.LlamaConfig(**ROTARY, rope_parameters=rope), tmp_path)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert longest_sample(model, 100) == 100
    assert before and all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


# How long samples may be


LIMITED = {
    "gpt2": (transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4), 32),
    "opt": (
        transformers.OPTConfig(**SMALL, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32),
        32,
    ),
    "mpt": (transformers.MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4, max_seq_len=32), 32),
    # Its first position is the one behind that of padding.
    "roberta": (transformers.RobertaConfig(**SMALL, max_position_embeddings=34, is_decoder=True), 32),
    "gptj": (transformers.GPTJConfig(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=4, rotary_dim=4), 32),
}


@pytest.mark.parametrize("family", LIMITED)
def test_samples_longer_than_the_positions_are_refused(family, tmp_path):
    config, longest = LIMITED[family]
    model = written(config, tmp_path)
    require_positions(model, longest)
    for length in (longest + 1, 64):
        said = rf"data.sequence_length={length} is longer than the {longest} positions.*data.sequence_length<={longest}"
        with pytest.raises(ConfigError, match=said):
            require_positions(model, length)


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**ROTARY),
        transformers.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, seq_length=32),
        transformers.MixtralConfig(**ROTARY, num_local_experts=4),
    ],
    ids=lambda config: config.model_type,
)
def test_rotary_positions_and_alibi_have_no_end(config, tmp_path):
    require_positions(written(config, tmp_path), 64)


# Whether it looks ahead


def moved(config):
    torch.manual_seed(0)
    model = build_causal_lm(config).eval()
    return leak(lambda tokens: model(input_ids=tokens).logits, 97, 32, torch.device("cpu"), from_later=True)


LOOKING_AHEAD = {
    "bert": transformers.BertConfig(**SMALL),
    "roberta": transformers.RobertaConfig(**SMALL),
    "electra": transformers.ElectraConfig(**SMALL, embedding_size=32),
    "big_bird": transformers.BigBirdConfig(**SMALL),
    "roformer": transformers.RoFormerConfig(**SMALL, embedding_size=32),
    "gemma": transformers.Gemma3TextConfig(**TEXT, use_bidirectional_attention=True),
    "xlm": transformers.XLMConfig(vocab_size=97, emb_dim=32, n_layers=2, n_heads=4),
    "xlnet": transformers.XLNetConfig(vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=48),
}
CAUSAL = {
    "bert": transformers.BertConfig(**SMALL, is_decoder=True),
    "gemma": transformers.Gemma3TextConfig(**TEXT),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL),
    "mixtral": transformers.MixtralConfig(**ROTARY, num_local_experts=8),
    "sliding": transformers.MistralConfig(**ROTARY, sliding_window=4),
    "chunked": transformers.Llama4TextConfig(
        **TEXT, intermediate_size_mlp=48, attention_chunk_size=8, num_local_experts=2
    ),
    "mamba": transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4),
    "jamba": transformers.JambaConfig(**SMALL, num_key_value_heads=2, num_experts=2, use_mamba_kernels=False),
}


@pytest.mark.parametrize("family", LOOKING_AHEAD)
def test_models_that_look_ahead_are_seen(family):
    assert moved(LOOKING_AHEAD[family]) > 1e-3


@pytest.mark.parametrize("family", CAUSAL)
def test_causal_models_do_not_move(family):
    assert moved(CAUSAL[family]) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_of_a_model_that_looks_ahead_is_refused(precision, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "broadcast_json", lambda value: value)
    for is_decoder in (True, False):
        model = written(transformers.BertConfig(**SMALL, is_decoder=is_decoder), tmp_path)
        config = TrainConfig(
            model=ModelConfig(kind=ModelKind.hf, name=model.name, vocab_size=97),
            data=DataConfig(sequence_length=64),
            engine=EngineConfig(precision=Precision[precision]),
        )
        torch.manual_seed(0)
        engine = SimpleNamespace(module=TaskModel(build_model(model), CausalLM()), device=torch.device("cpu"))
        engine.module.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        if is_decoder:
            build.require_causal(engine, config)
        else:
            with pytest.raises(ConfigError, match=r"looks ahead.*is_decoder=false.*is_decoder=true"):
                build.require_causal(engine, config)


# Code that comes with a model


def test_code_of_a_model_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of_its_own", "auto_map": code}))
    (tmp_path / "own.py").write_text("raise SystemExit('the code ran')\n")
    with pytest.raises(ConfigError, match="needs code of its own"):
        build_model(ModelConfig(kind=ModelKind.hf, name=str(tmp_path)))


def test_masks_of_long_samples_are_not_computed_for_real():
    short, long = torch.arange(300, device="cpu"), torch.arange(2**15, device="cpu")
    with probe._DryRun():
        masks = [torch.ones(len(row), len(row), device="meta") for row in (short, long)]
        masks += [row[:, None] <= row for row in (short, long)]
    assert [mask.is_meta for mask in masks] == [False, True, False, True]
