import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bigtrain.config import ModelConfig, ModelKind
from bigtrain.errors import ConfigError
from bigtrain.models import build_model, initial_values
from bigtrain.models.generation import generate
from bigtrain.models.hf.build import build_hf_model, with_hf_shape
from bigtrain.models.hf.files import stored_tensors
from bigtrain.models.sizes import native_shape
from tests.modules import initialise, materialise

SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
CONFIGS = {
    "gpt2": transformers.GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=3, n_head=4),
    "llama": transformers.LlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=32),
    "llama tied": transformers.LlamaConfig(**SMALL, max_position_embeddings=32, tie_word_embeddings=True),
    "gemma": transformers.GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=8, max_position_embeddings=32),
    "qwen2": transformers.Qwen2Config(**SMALL, num_key_value_heads=2, max_position_embeddings=32),
    "mixtral": transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=8),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, max_position_embeddings=32),
    "mamba": transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=3, state_size=4),
}
TOKENS_BT = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=CONFIGS)
def directory(request, tmp_path):
    CONFIGS[request.param].save_pretrained(tmp_path)
    return tmp_path


def described(directory, **changes):
    return ModelConfig(kind=ModelKind.hf, name=str(directory), **changes)


def built(config, seed=0):
    with torch.device("meta"):
        model = build_model(config)
    values = initial_values(model, config, seed)
    assert list(values) == [name for name, _ in model.named_parameters()]
    materialise(model, torch.device("cpu"))
    initialise(model, values)
    return model


def reference(family, seed=0):
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[family]).eval()


def test_meta_build_has_parameters_on_meta_and_true_buffers(directory):
    config = described(directory)
    with torch.device("meta"):
        model = build_model(config)
    assert all(param.is_meta and param.dtype == torch.float32 for param in model.parameters())
    real = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    buffers = dict(model.causal_lm.named_buffers())
    assert buffers.keys() == dict(real.named_buffers()).keys()
    for name, buffer in real.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)
    assert [name for name, _ in model.causal_lm.named_parameters()] == [name for name, _ in real.named_parameters()]
    assert torch.nn.Linear(2, 2).weight.device.type == "cpu"


def test_blocks_are_the_decoder_layers(directory):
    with torch.device("meta"):
        blocks = build_model(described(directory)).blocks
    assert len(blocks) == 3 and len({type(block) for block in blocks}) == 1


def test_fresh_values_have_the_distribution_of_transformers(directory):
    model = built(described(directory))
    torch.manual_seed(1)
    real = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    # Mamba's are uniform or rescaled; whether GPT-2's are scaled depends on the version of transformers.
    drawn_otherwise = ("dt_proj.weight", "conv1d.weight", "out_proj", "c_proj.weight")
    compared = {name: param for name, param in real.named_parameters() if not any(n in name for n in drawn_otherwise)}
    for name, param in compared.items():
        ours = model.causal_lm.get_parameter(name)
        if "dt_proj.bias" in name:  # random; transformers draws the inverse softplus of 0.001 to 0.1
            assert (ours > -7).all() and (ours < -2).all() and (param > -7).all() and (param < -2).all()
        elif param.ndim < 2 or "A_log" in name:
            torch.testing.assert_close(ours, param, msg=name)
        else:
            assert ours.std().item() == pytest.approx(param.std().item(), rel=0.25), name
            assert abs(ours.mean() - param.mean()) < 0.3 * param.std(), name


def test_residual_outputs_of_gpt2_are_scaled_by_depth(tmp_path):
    CONFIGS["gpt2"].save_pretrained(tmp_path)
    for block in built(described(tmp_path)).blocks:
        assert block.mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1)


def test_fresh_values_follow_the_seed_alone(directory):
    config = described(directory)
    torch.manual_seed(1)
    first = built(config, seed=4).state_dict()
    torch.manual_seed(2)
    second, other = built(config, seed=4).state_dict(), built(config, seed=5).state_dict()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("family", CONFIGS)
def test_published_weights_give_the_published_logits_and_loss(family, tmp_path):
    real = reference(family)
    real.save_pretrained(tmp_path, max_shard_size="20KB", save_original_format=False)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = built(described(tmp_path, pretrained=True)).eval()
    targets_BT = TOKENS_BT.roll(-1, 1)
    with torch.no_grad():
        expected = real(input_ids=TOKENS_BT).logits
        torch.testing.assert_close(model(TOKENS_BT), expected, rtol=1e-5, atol=1e-6)
        loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets_BT.flatten(), reduction="sum")
        torch.testing.assert_close(model(TOKENS_BT, targets_BT), loss)


def test_published_values_are_read_in_slices(tmp_path):
    reference("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    config = described(tmp_path, pretrained=True)
    with torch.device("meta"):
        model = build_model(config)
    stored = load_file(tmp_path / "model.safetensors")
    for name, value in initial_values(model, config, seed=0).items():
        full = stored[name.removeprefix("causal_lm.")].float().flatten()
        for start, stop in [(0, full.numel()), (1, 2), (7, 31), (full.numel() - 3, full.numel()), (5, 5)]:
            out = torch.empty(stop - start)
            value.fill(start, out)
            assert torch.equal(out, full[start:stop])


def test_files_of_the_bare_decoder_can_be_read(tmp_path):
    real = reference("gpt2")
    real.transformer.save_pretrained(tmp_path)
    assert "h.0.ln_1.weight" in load_file(tmp_path / "model.safetensors")
    model = built(described(tmp_path, pretrained=True)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS_BT), real(input_ids=TOKENS_BT).logits)


def test_tied_weight_is_found_under_its_other_name(tmp_path):
    real = reference("llama tied")
    real.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors")
    model = built(described(tmp_path, pretrained=True))
    assert torch.equal(model.causal_lm.model.embed_tokens.weight, real.lm_head.weight)
    assert model.causal_lm.lm_head.weight is model.causal_lm.model.embed_tokens.weight


def test_stored_buffers_are_read(tmp_path):
    sizes = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=8)
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**SMALL, **sizes, **experts, first_k_dense_replace=1)
    real = transformers.AutoModelForCausalLM.from_config(config).eval()
    biases = [buffer for name, buffer in real.named_buffers() if name.endswith("e_score_correction_bias")]
    for bias in biases:
        bias.copy_(torch.randn(bias.shape))
    real.save_pretrained(tmp_path, save_original_format=False)
    model = built(described(tmp_path, pretrained=True)).eval()
    assert len(biases) == 2 and len(model.blocks) == 3
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS_BT), real(input_ids=TOKENS_BT).logits)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mamba"])
def test_greedy_generation_is_that_of_transformers(family, tmp_path):
    real = reference(family)
    real.save_pretrained(tmp_path)
    model = built(described(tmp_path, pretrained=True))
    assert (model.new_cache(20) is None) == (family == "mamba")
    expected = real.generate(TOKENS_BT[:1], max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert generate(model, TOKENS_BT[0].tolist(), max_new_tokens=8, temperature=0) == expected[0, 12:].tolist()


def test_gradients_reach_every_parameter(tmp_path):
    CONFIGS["llama tied"].save_pretrained(tmp_path)
    model = built(described(tmp_path))
    model(TOKENS_BT, TOKENS_BT.roll(-1, 1)).backward()
    assert all(param.grad is not None for param in model.parameters())


def test_unknown_name_is_explained():
    with pytest.raises(ConfigError, match=r"model.name='no/such/model'.*local directory"):
        build_model(described("no/such/model"))


def test_architecture_without_causal_form_is_explained(tmp_path):
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="decoder-only"):
        build_model(described(tmp_path))


def test_missing_weights_are_explained(tmp_path):
    CONFIGS["llama"].save_pretrained(tmp_path)
    config = described(tmp_path, pretrained=True)
    with torch.device("meta"):
        model = build_model(config)
    with pytest.raises(ConfigError, match=r"has no model.safetensors"):
        initial_values(model, config, seed=0)


@pytest.mark.parametrize("damage", ["lost", "reshaped"])
def test_weights_that_do_not_fit_are_named(damage, tmp_path):
    reference("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    norm = weights.pop("model.norm.weight")
    if damage == "reshaped":
        weights["model.norm.weight"] = norm[:5]
    save_file(weights, tmp_path / "model.safetensors")
    config = described(tmp_path, pretrained=True)
    with torch.device("meta"):
        model = build_model(config)
    with pytest.raises(ConfigError, match=r"1 tensors do not fit.*model.norm.weight"):
        initial_values(model, config, seed=0)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        # (hidden_dim, num_layers, num_heads, num_kv_heads, head_dim, ffn_dim)
        (CONFIGS["gpt2"], (32, 3, 4, 4, 8, 128)),
        (CONFIGS["llama"], (32, 3, 4, 2, 8, 48)),
        # Wider heads where attention is global; as many neurons as a layer says; nothing but inner configurations.
        (
            transformers.Gemma4TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, global_head_dim=16),
            (32, 3, 4, 2, 16, 48),
        ),
        (
            transformers.Gemma3nTextConfig(
                **SMALL | {"intermediate_size": [48, 48, 64]}, num_key_value_heads=2, head_dim=8, num_kv_shared_layers=0
            ),
            (32, 3, 4, 2, 8, 64),
        ),
        (transformers.BltConfig(), (2048, 25, 16, 16, 128, 5632)),
    ],
    ids=lambda value: value.model_type if isinstance(value, transformers.PreTrainedConfig) else "",
)
def test_shape_of_layers_that_differ_is_the_largest(tmp_path, config, shape):
    config.save_pretrained(tmp_path)
    model = with_hf_shape(described(tmp_path))
    found = (model.hidden_dim, model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim, model.ffn_dim)
    assert found == shape
    estimated = native_shape(transformers.AutoConfig.from_pretrained(tmp_path))
    assert (estimated.hidden_dim, estimated.num_layers, estimated.ffn_dim) == (shape[0], shape[1], shape[5])


BROKEN_CONFIGS = [
    (dict(hidden_size="64"), r"config.json is not read by transformers: .*expected int, got str.*; correct it"),
    (dict(num_attention_heads=0), r"config.json is not read by transformers: ZeroDivisionError"),
    (dict(num_attention_heads=5), r"config.json is not read by transformers: .*not a multiple"),
    (
        dict(hidden_act="nope"),
        r"cannot be trained as a causal language model: KeyError: 'nope'; .*correct its config.json",
    ),
    (dict(model_type="vit", vocab_size=None), r"\(vit\) has no vocabulary; choose a language model"),
]


@pytest.mark.parametrize(("settings", "said"), BROKEN_CONFIGS)
def test_a_configuration_that_cannot_be_is_said_in_a_sentence(tmp_path, settings, said):
    config = dict(model_type="llama", hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=50)
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ConfigError, match=said):
        model = with_hf_shape(ModelConfig(kind=ModelKind.hf, name=str(tmp_path)))
        with torch.device("meta"):
            build_hf_model(model)


def test_an_index_of_weight_files_that_names_none_is_said_in_a_sentence(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(ConfigError, match=r"index.json is no index of weight files"):
        stored_tensors(str(tmp_path))
