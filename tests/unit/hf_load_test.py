"""Tensors of weight files are used or named, and what is used is what transformers makes of them."""

import dataclasses
import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bigtrain.config import CheckpointConfig, ModelConfig, ModelKind, RunConfig, TrainConfig
from bigtrain.errors import ConfigError
from bigtrain.models import build_initial_values, build_model, initial_values
from bigtrain.models.hf.build import read_hf_config
from bigtrain.run.directory import unused_of_model
from tests.modules import initialise, materialise

SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
GROUPED = dict(SMALL, num_key_value_heads=2)
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=8)
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
)
CONVERTED = {
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL),
    "mixtral": transformers.MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen2_moe": transformers.Qwen2MoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "qwen3_moe": transformers.Qwen3MoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "olmoe": transformers.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": transformers.DeepseekV3Config(**SMALL, **LATENT, **EXPERTS, first_k_dense_replace=1),
    "jamba": transformers.JambaConfig(**GROUPED, num_experts=2, use_mamba_kernels=False),
    "gemma3": transformers.Gemma3Config(
        text_config=dict(GROUPED, head_dim=8), vision_config=VISION, mm_tokens_per_image=4
    ),
}
TOKENS_BT = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))


def published(config, directory, *, seed=0):
    """Save a model as its authors would, nothing in it zero or one."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.ndim < 2:
                tensor.add_(0.1 * torch.rand(tensor.shape))
    model.save_pretrained(directory, max_shard_size="20KB")
    return model


def built(directory):
    """Build as a run does: the model of the engine is not the one that the values are found for."""
    config = ModelConfig(kind=ModelKind.hf, name=str(directory), pretrained=True)
    with torch.device("meta"):
        model = build_model(config)
    materialise(model, torch.device("cpu"))
    initialise(model, build_initial_values(config, seed=0))
    return model.eval()


@pytest.mark.parametrize("family", CONVERTED)
def test_published_weights_give_the_logits_that_transformers_gives(family, tmp_path):
    published(CONVERTED[family], tmp_path)
    files = {key for path in tmp_path.glob("*.safetensors") for key in load_file(path)}
    model = built(tmp_path)
    names = {name.removeprefix("causal_lm.") for name, _ in model.named_parameters()}
    assert files - names, "the files have names that the model has not"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS_BT, use_cache=False).logits
        torch.testing.assert_close(model(TOKENS_BT), expected, rtol=1e-5, atol=1e-6)


def test_converted_values_are_made_in_slices(tmp_path):
    published(CONVERTED["mixtral"], tmp_path)
    config = ModelConfig(kind=ModelKind.hf, name=str(tmp_path), pretrained=True)
    with torch.device("meta"):
        values = initial_values(build_model(config), config, seed=0)
    theirs = dict(transformers.AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    for name in reversed(list(values)):  # not the order of the files
        full = theirs[name.removeprefix("causal_lm.")].detach().flatten()
        for start, stop in [(0, full.numel()), (1, 2), (7, 31), (full.numel() - 3, full.numel()), (5, 5)]:
            out = torch.empty(stop - start)
            values[name].fill(start, out)
            assert torch.equal(out, full[start:stop]), name


def changed(directory, change, **settings):
    """Write a small Llama whose tensors ``change`` has changed, with other settings."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True))
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text()) | settings
    (directory / "config.json").write_text(json.dumps(config))
    return model


LAYER = "model.layers.0.self_attn.q_proj"
USELESS = {
    "bias": (lambda t: t.update({f"{LAYER}.bias": torch.ones(32)}), f"{LAYER}.bias"),
    "layer": (
        lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(32)}),
        r"model.layers.2.input_lay",
    ),
    "head": (lambda t: t.update({"lm_head.weight": torch.ones(97, 32)}), r"lm_head.weight.*tie_word_embeddings"),
    "scale": (lambda t: t.update({f"{LAYER}.weight_scale_inv": torch.ones(1, 1)}), f"{LAYER}.weight_scale_inv"),
    "eight bits": (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].to(torch.float8_e4m3fn)}), "F8_E4M3"),
    "integers": (lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].to(torch.int8)}), "I8"),
    "adapter": (lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(4, 32)}), f"{LAYER}.lora_A.weight"),
}


@pytest.mark.parametrize("what", USELESS)
def test_tensors_that_the_model_has_no_use_for_are_named(what, tmp_path):
    change, said = USELESS[what]
    changed(tmp_path, change)
    with pytest.raises(ConfigError, match=rf"^model.name=.*1 tensors do not fit.*{said}"):
        built(tmp_path)


def test_what_can_be_derived_may_be_left_over(tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    theirs = changed(tmp_path, change).eval()
    with torch.no_grad():
        torch.testing.assert_close(built(tmp_path)(TOKENS_BT), theirs(TOKENS_BT).logits)


def test_masks_in_old_files_may_be_left_over_and_biases_may_not(tmp_path):
    shape = dict(vocab_size=97, n_positions=16, n_embd=32, n_layer=1, n_head=4)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    theirs.save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "transformer.h.0.attn.{}"
    masks = {"bias": torch.ones(1, 1, 16, 16).tril(), "masked_bias": torch.tensor(-1e4)}
    tensors = load_file(path) | {name.format(key): mask for key, mask in masks.items()}
    save_file(tensors, path)
    with torch.no_grad():
        torch.testing.assert_close(built(tmp_path)(TOKENS_BT), theirs(TOKENS_BT).logits)
    save_file(tensors | {name.format("masked_bias"): torch.ones(32)}, path)
    with pytest.raises(ConfigError, match=r"1 tensors do not fit.*masked_bias"):
        built(tmp_path)


def test_quantised_weights_are_refused(tmp_path):
    changed(
        tmp_path, lambda tensors: None, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}
    )
    with pytest.raises(ConfigError, match="quantization_config"):
        built(tmp_path)


def test_what_transformers_leaves_out_is_said(tmp_path, caplog):
    config = transformers.Qwen3NextConfig(
        **GROUPED, num_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 2
    )
    published(config, tmp_path)
    path = next(iter(tmp_path.glob("*.safetensors")))
    save_file(load_file(path) | {"mtp.norm.weight": torch.ones(32)}, path)
    with caplog.at_level("WARNING"):
        built(tmp_path)
    assert "1 tensors are left out, as transformers does: mtp.norm.weight" in caplog.text


# Files that are not whole


def split(directory):
    published(transformers.LlamaConfig(**GROUPED), directory)
    return sorted(directory.glob("model-*.safetensors")), directory / "model.safetensors.index.json"


@pytest.mark.parametrize("keep", [0, 7, 300, -1])
def test_a_file_that_is_cut_off_is_named(keep, tmp_path):
    path = split(tmp_path)[0][1]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=f"{path.name} is cut off or damaged"):
        built(tmp_path)


def test_files_and_their_index_agree(tmp_path):
    paths, index = split(tmp_path)
    twice = load_file(paths[1])
    save_file(twice | load_file(paths[0]), paths[0])
    with pytest.raises(ConfigError, match=f"{next(iter(twice))} is both in .*{paths[0].name}.*{paths[1].name}"):
        built(tmp_path)
    paths[0].unlink()
    with pytest.raises(
        ConfigError, match=f"has no {paths[0].name}, which {index.name} lists; copy or download it again"
    ):
        built(tmp_path)
    index.write_text("{}")
    with pytest.raises(ConfigError, match=r"index.json is no index"):
        built(tmp_path)


def test_two_sets_of_files_are_one_too_many(tmp_path):
    paths, _ = split(tmp_path)
    save_file(load_file(paths[0]), tmp_path / "model.safetensors")
    with pytest.raises(
        ConfigError, match=r"both model.safetensors and model.safetensors.index.json, which lists other files"
    ):
        built(tmp_path)


def unused(directory, **settings):
    """Return what a run that begins is told of the directory of its model."""
    model = ModelConfig(kind=ModelKind.hf, name=str(directory), pretrained=True)
    run = RunConfig(root=str(directory / "runs"), name="x")
    return unused_of_model(dataclasses.replace(TrainConfig(model=model, run=run), **settings))


def test_a_missing_file_is_found_before_anything_is_prepared(tmp_path):
    paths, index = split(tmp_path)
    assert unused(tmp_path) == []
    paths[0].unlink()
    with pytest.raises(ConfigError, match=f"has no {paths[0].name}, which {index.name} lists"):
        unused(tmp_path)
    elsewhere = {"checkpoint": CheckpointConfig(resume="runs/other")}
    assert unused(tmp_path, **elsewhere) == [], "the weights of another run are those that it begins with"
    (tmp_path / "runs/x/checkpoints/step-00000007").mkdir(parents=True)
    assert unused(tmp_path) == [], "it has its own"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "has no model.safetensors; only safetensors files are read: .*save_pretrained"),
        (["pytorch_model.bin"], "no model.safetensors, only pytorch_model.bin; only safetensors files are read"),
        (["a.gguf", "tf_model.h5"], "no model.safetensors, only a.gguf, tf_model.h5; only safetensors"),
        (
            ["model-00002-of-00002.safetensors"],
            r"neither model.safetensors nor .*index.json.*copy or download the index",
        ),
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            r"an adapter \(adapter_config.json\).*merge_and_unload\(\)",
        ),
    ],
)
def test_other_files_are_no_weights_of_a_model(names, said, tmp_path):
    transformers.LlamaConfig(**GROUPED).save_pretrained(tmp_path)
    for name in names:
        (tmp_path / name).touch()
    for read in (unused, built):
        with pytest.raises(ConfigError, match=said):
            read(tmp_path)


def test_what_lies_beside_the_weights_is_said(tmp_path):
    theirs = changed(tmp_path, lambda tensors: None).eval()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "README.md", "merges.txt"):
        (tmp_path / name).touch()
    (said,) = unused(tmp_path)
    assert "not read: consolidated.safetensors, pytorch_model.bin; the weights are those of its safetensors" in said
    with torch.no_grad():
        torch.testing.assert_close(built(tmp_path)(TOKENS_BT), theirs(TOKENS_BT).logits)
    (tmp_path / "adapter_config.json").write_text("{}")  # transformers would apply it
    with pytest.raises(ConfigError, match="an adapter"):
        built(tmp_path)


def test_an_adapter_alone_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigError, match=r"an adapter \(adapter_config.json\).*merge_and_unload"):
        read_hf_config(str(tmp_path))


def test_code_that_is_not_run_is_said(tmp_path):
    changed(tmp_path, lambda tensors: None, auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (tmp_path / "own.py").write_text("raise SystemExit('executed')")
    (said,) = unused(tmp_path)
    assert "its code (auto_map in its config.json) is not run; transformers' own llama is trained" in said
    built(tmp_path)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e300"])
def test_numbers_that_are_not_finite_are_refused_with_their_tensor(number, tmp_path):
    def change(tensors):
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].double()
        tensors[f"{LAYER}.weight"][3, 5] = float(number)

    changed(tmp_path, change)
    what = "NaN" if number == "nan" else "infinite"
    with pytest.raises(
        ConfigError, match=rf"^model.name=.*: {LAYER}.weight has numbers that are {what} in the published"
    ):
        built(tmp_path)


def test_the_same_holds_for_what_is_made_of_several_tensors_tied_ones_and_buffers(tmp_path):
    def spoil(directory, key):
        for path in directory.glob("*.safetensors"):
            if key in (tensors := load_file(path)):
                tensors[key].view(-1)[-1] = math.nan
                save_file(tensors, path)

    published(CONVERTED["mixtral"], tmp_path / "a")
    spoil(tmp_path / "a", "model.layers.1.block_sparse_moe.experts.2.w2.weight")
    with pytest.raises(ConfigError, match=r"model.layers.1.mlp.experts.down_proj has numbers that are NaN"):
        built(tmp_path / "a")
    changed(tmp_path / "b", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    spoil(tmp_path / "b", "lm_head.weight")
    spoil(tmp_path / "b", "model.embed_tokens.weight")
    with pytest.raises(ConfigError, match=r": model.embed_tokens.weight has numbers that are NaN"):
        built(tmp_path / "b")
    published(CONVERTED["deepseek_v3"], tmp_path / "c")
    spoil(tmp_path / "c", "model.layers.1.mlp.gate.e_score_correction_bias")
    with pytest.raises(
        ConfigError, match=r": model.layers.1.mlp.gate.e_score_correction_bias has numbers that are NaN"
    ):
        built(tmp_path / "c")


# What a model starts from without files


def test_what_only_a_constructor_says_is_what_parameters_start_from(tmp_path):
    config = transformers.ApertusConfig(**GROUPED)
    config.save_pretrained(tmp_path)
    values = build_initial_values(ModelConfig(kind=ModelKind.hf, name=str(tmp_path)), seed=0)
    theirs = dict(transformers.AutoModelForCausalLM.from_config(config).named_parameters())
    for name, parameter in theirs.items():
        if "act_fn" in name:
            out = torch.empty(parameter.numel())
            values[f"causal_lm.{name}"].fill(0, out)
            assert torch.equal(out, parameter.detach().flatten())


def test_a_frozen_table_is_not_drawn(tmp_path):
    config = transformers.RoFormerConfig(**SMALL, embedding_size=32, is_decoder=True, max_position_embeddings=16)
    config.save_pretrained(tmp_path)
    values = build_initial_values(ModelConfig(kind=ModelKind.hf, name=str(tmp_path)), seed=0)
    table = torch.empty(16 * 8)
    values["causal_lm.roformer.encoder.embed_positions.weight"].fill(0, table)
    assert torch.equal(table.view(16, 8)[0], torch.tensor([0.0] * 4 + [1.0] * 4))


def test_an_evaluation_changes_no_weight(tmp_path):
    transformers.RwkvConfig(vocab_size=97, hidden_size=16, num_hidden_layers=7, context_length=16).save_pretrained(
        tmp_path
    )
    config = ModelConfig(kind=ModelKind.hf, name=str(tmp_path))
    model = build_model(config)
    initialise(model, build_initial_values(config, seed=0))
    before = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        trained = model.train()(TOKENS_BT)
        torch.testing.assert_close(model.eval()(TOKENS_BT), trained)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
