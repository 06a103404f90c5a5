"""To transformers and back: the same logits, the same bits, the same tokens."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bigtrain.checkpoint.shard import Piece, write_shard
from bigtrain.checkpoint.store import RunState, checkpoint_path, commit
from bigtrain.config import DataConfig, ModelConfig, ModelKind, Precision, TrainConfig
from bigtrain.config.check import check, resolve
from bigtrain.config.convert import from_dict, to_dict
from bigtrain.data.read.index import FORMAT, CorpusIndex, SplitRecord, TokenizerRecord, write_index
from bigtrain.data.read.tokenizer import END_OF_TEXT, build_tokenizer
from bigtrain.engine.state import MODEL, OPTIMIZER
from bigtrain.errors import CheckpointError, ConfigError
from bigtrain.files import FileRecord
from bigtrain.models import build_initial_values, build_model
from bigtrain.models.hf.files import StoredTensor
from bigtrain.models.hf.native import Stacked, hf_config, hf_tensors
from bigtrain.models.init import Whole
from bigtrain.run import export as export_module
from bigtrain.run.export import export
from tests.modules import initialise, materialise

STEP = 7
SIZES = {"vocab_size": 97, "num_layers": 2, "hidden_dim": 24, "num_heads": 3, "max_positions": 16, "norm_eps": 3e-5}
LLAMA = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "rope_theta": 500.0}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_positions": 8}


def shape(**changes) -> ModelConfig:
    return resolve(TrainConfig(model=from_dict(ModelConfig, {**SIZES, **changes}))).model


MODELS = {
    "gpt2 tied": shape(ffn_dim=40),
    "gpt2 untied": shape(tie_embeddings=False, dropout=0.1),
    "llama untied grouped": shape(**LLAMA, tie_embeddings=False, num_heads=4, num_kv_heads=2, ffn_dim=40),
    "llama linear": shape(**LLAMA, rope_scaling={"kind": "linear", "factor": 4.0}),
    "llama yarn": shape(**LLAMA, rope_scaling={"kind": "yarn", "factor": 4.0, "original_max_positions": 8}),
    "llama tied scaled": shape(**LLAMA, rope_scaling=SCALING, num_heads=4, num_kv_heads=1),
    "llama wide heads and biases": shape(**{**LLAMA, "bias": True}, head_dim=12),
}
TOKENS_BT = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(0))


def native(config: ModelConfig, seed: int = 0):
    """A native model whose every parameter, norms and biases too, is random."""
    with torch.device("meta"):
        model = build_model(config)
    materialise(model, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 * (parameter.ndim == 1), 0.2, generator=generator)
    return model.eval()


def started(config: ModelConfig):
    """A model with the initial values of its configuration."""
    with torch.device("meta"):
        model = build_model(config)
    materialise(model, torch.device("cpu"))
    initialise(model, build_initial_values(config, seed=0))
    return model.eval()


def save(run: Path, model: torch.nn.Module, config: ModelConfig, *, step: int = STEP) -> Path:
    """Write a checkpoint as two ranks under FSDP do: each one part of the rows, and of the optimizer's state."""
    final = checkpoint_path(run, step)
    partial = final.with_name(f"{final.name}.tmp-0")
    partial.mkdir(parents=True)
    files, tensors = [], []
    for rank in range(2):
        pieces = []
        for name, parameter in model.named_parameters():
            rows = parameter.detach().chunk(2)
            if rank < len(rows):
                offsets = (rank * len(rows[0]), *(0 for _ in parameter.shape[1:]))
                for key in (MODEL + name, f"{OPTIMIZER}{name}.exp_avg"):
                    pieces.append(Piece(key, tuple(parameter.shape), offsets, rows[rank]))
        file, records = write_shard(partial / f"rank-{rank:05d}.safetensors", pieces)
        files.append(file)
        tensors += records
    commit(partial, final, RunState(step, 0, 0, "", to_dict(TrainConfig(model=config)), {}, 2), files, tensors)
    return final


def exported(
    tmp_path: Path, model: torch.nn.Module, config: ModelConfig, *, shard_bytes: int = 10**9, **fields
) -> Path:
    save(tmp_path / "run", model, config)
    fields = {"precision": Precision.fp32, **fields}
    export(tmp_path / "run", tmp_path / "out", max_shard_bytes=shard_bytes, **fields)
    return tmp_path / "out"


def opened(directory: Path, **kwargs):
    """The model as transformers opens it; nothing may be missing or left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def assert_same_logits(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    expected = theirs(input_ids=TOKENS_BT).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(TOKENS_BT), expected, rtol=1e-5, atol=1e-5)


# Models


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same_logits(name: str, tmp_path: Path):
    model = native(MODELS[name])
    theirs = opened(exported(tmp_path, model, MODELS[name]))
    assert type(theirs).__name__ == {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM"}[name.split()[0]]
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}
    assert_same_logits(model, theirs)
    with torch.no_grad():  # the comparison notices one wrong number
        theirs.get_input_embeddings().weight[TOKENS_BT[0, 0], 0] += 0.1
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(model, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_a_native_model_starts_from_transformers_weights(name: str, tmp_path: Path):
    torch.manual_seed(1)
    theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**hf_config(MODELS[name])))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    theirs.eval().save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config = shape(**{**to_dict(MODELS[name]), "init_from": str(tmp_path)})
    assert_same_logits(started(config), theirs)


@pytest.mark.parametrize("name", MODELS)
def test_out_and_in_again_is_bitwise_the_same(name: str, tmp_path: Path):
    model = native(MODELS[name])
    out = exported(tmp_path, model, MODELS[name], shard_bytes=8000)
    again = started(shape(**{**to_dict(MODELS[name]), "init_from": str(out)}))
    for key, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(key), parameter), key
    theirs = opened(out)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="1GB")
    stored = load_file(tmp_path / "theirs/model.safetensors")
    assert stored.keys() == {tensor.name for tensor in hf_tensors(MODELS[name])}


def test_configuration_says_what_the_model_is(tmp_path: Path):
    name = "llama tied scaled"
    config = transformers.AutoConfig.from_pretrained(exported(tmp_path, native(MODELS[name]), MODELS[name]))
    rope = {"rope_theta": 500.0, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert config.rope_parameters == rope | {"original_max_position_embeddings": 8}
    assert (config.num_key_value_heads, config.head_dim, config.max_position_embeddings) == (1, 6, 16)
    assert (config.tie_word_embeddings, config.rms_norm_eps, config.dtype) == (True, 3e-5, torch.float32)
    assert (config.bos_token_id, config.eos_token_id) == (None, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(positions="rope"), ["nearest architecture is gpt2", "model.positions=rope: gpt2 has learned"]),
        (dict(bias=False), ["model.bias=false: gpt2 has true"]),
        (dict(num_kv_heads=1), ["model.num_kv_heads=1: gpt2 has as many as model.num_heads=3"]),
        (dict(head_dim=4), ["model.head_dim=4"]),
        (dict(LLAMA, activation="gelu"), ["nearest architecture is llama", "model.activation=gelu: llama has swiglu"]),
        (dict(LLAMA, hidden_dim=25, head_dim=8), ["model.hidden_dim=25"]),
    ],
)
def test_what_transformers_lacks_is_named(changes: dict, said: list[str], tmp_path: Path):
    config = shape(**changes)
    with pytest.raises(ConfigError) as caught:
        exported(tmp_path, native(config), config)
    assert all(text in str(caught.value) for text in said)
    assert len(str(caught.value).splitlines()) == 1 + sum("model." in text for text in said)
    assert not (tmp_path / "out").exists()


def test_bf16_is_the_rounded_weights(tmp_path: Path):
    name = "gpt2 untied"
    model = native(MODELS[name])
    theirs = opened(exported(tmp_path, model, MODELS[name], precision=Precision.bf16))
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    assert torch.equal(theirs.lm_head.weight, model.output.weight.bfloat16())
    assert torch.equal(theirs.transformer.h[1].mlp.c_fc.weight, model.blocks[1].feed_forward.up.weight.bfloat16().t())


# Files


def test_shards_hold_every_tensor_once(tmp_path: Path):
    name, limit = "llama untied grouped", 8000
    out = exported(tmp_path, native(MODELS[name]), MODELS[name], shard_bytes=limit)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    found = {}
    for path in sorted(out.glob("*.safetensors")):
        tensors = load_file(path)
        assert sum(t.nbytes for t in tensors.values()) <= limit or len(tensors) == 1
        assert not tensors.keys() & found.keys()
        found |= dict.fromkeys(tensors, path.name)
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
    assert len(set(found.values())) > 3
    assert index["weight_map"] == found
    assert found.keys() == {tensor.name for tensor in hf_tensors(MODELS[name])}
    assert index["metadata"]["total_size"] == sum(4 * p.numel() for p in native(MODELS[name]).parameters())


def test_one_file_has_the_usual_name(tmp_path: Path):
    out = exported(tmp_path, native(MODELS["gpt2 tied"]), MODELS["gpt2 tied"])
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


def test_nothing_is_overwritten(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="out exists; nothing is overwritten"):
        exported(tmp_path, native(MODELS["gpt2 tied"]), MODELS["gpt2 tied"])


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_args: object, **_settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_module, "save_file", full)
    with pytest.raises(ConfigError, match=r"out cannot be written: .*No space left"):
        exported(tmp_path, native(MODELS["gpt2 tied"]), MODELS["gpt2 tied"])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    config = MODELS["gpt2 tied"]
    for step in (1, 2):
        path = save(tmp_path / "run", native(config, seed=step), config, step=step)
    damaged = path / "rank-00001.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    out = tmp_path / "out"
    result = export(tmp_path / "run", out, precision=Precision.fp32, max_shard_bytes=10**9)
    assert result.checkpoint == checkpoint_path(tmp_path / "run", 1)
    assert path.is_dir(), "reading sets nothing aside"
    assert torch.equal(opened(out).transformer.wte.weight, native(config, seed=1).embed_tokens.weight)
    with pytest.raises(CheckpointError, match=r"no whole checkpoint(.|\n)*rank-00001.safetensors"):
        export(path, tmp_path / "other", precision=Precision.fp32, max_shard_bytes=10**9)
    with pytest.raises(CheckpointError, match="nowhere"):
        export(tmp_path / "nowhere", tmp_path / "other", precision=Precision.fp32, max_shard_bytes=10**9)


# Models of transformers


DEEPSEEK = transformers.DeepseekV3Config(
    **dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48),
    **dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
    **dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=8),
    first_k_dense_replace=1,
)
LLAMA_TIED = transformers.AutoConfig.for_model(**hf_config(MODELS["llama tied scaled"]))


@pytest.mark.parametrize("described", [LLAMA_TIED, DEEPSEEK], ids=["llama", "deepseek with a stored buffer"])
def test_a_model_of_transformers_keeps_its_configuration(described: transformers.PreTrainedConfig, tmp_path: Path):
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(described).eval()
    stored = theirs.state_dict().keys()
    for name, buffer in theirs.named_buffers():
        if name in stored:
            buffer.copy_(torch.randn(buffer.shape))
    theirs.save_pretrained(tmp_path / "published", save_original_format=False)
    config = ModelConfig(kind=ModelKind.hf, name=str(tmp_path / "published"), pretrained=True)
    again = opened(exported(tmp_path, started(config), config))
    assert again.config.to_diff_dict().keys() == theirs.config.to_diff_dict().keys()
    assert type(again) is type(theirs)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


# The tokenizer, and no code of ours


def give_tokenizer(run: Path, kind: str):
    """Put into a run what a training on text leaves there."""
    sample = ["def add(a, b):\n    return a + b\n", "naïve café — 東京 🙂\n"] * 20
    built = build_tokenizer(DataConfig(tokenizer=kind, tokenizer_vocab_size=300), sample)
    run.mkdir(parents=True)
    built.tokenizer.save(str(run / "tokenizer.json"))
    file = FileRecord(name="x", num_bytes=0, xxh3="")
    tokens = SplitRecord(shards=[], num_tokens=0, num_documents=0, num_text_bytes=0, unigram_nats_per_token=0.0)
    record = TokenizerRecord(name=kind, file=file, vocab_size=300, eos_id=built.eos_id)
    facts = dict.fromkeys(("identity", "source", "source_fingerprint"), "")
    counts = {"num_empty_documents": 0, "num_repaired_documents": 0}
    write_index(
        run,
        CorpusIndex(
            format=FORMAT, **facts, **counts, dtype="uint16", tokenizer=record, train=tokens, validation=tokens
        ),
    )
    return built


TEXTS = [
    "def main():\n\treturn 'naïve' , [ 1 ] .\r\n",
    "  two spaces, 東京 🙂 \x00 ",
    f"{END_OF_TEXT} is text here",
    "it 's n't",
]
# What somebody does who has never heard of this project.
STRANGER = """
import json, sys
sys.modules["bigtrain"] = None  # torch would import what torchrun takes of it, as of every package with such an entry point
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained("out"), AutoTokenizer.from_pretrained("out")
texts = json.loads(sys.argv[1])
ids = [tokenizer(text)["input_ids"] for text in texts]
prompt = tokenizer(texts[0][:9], return_tensors="pt")
new = model.generate(**prompt, max_new_tokens=4, do_sample=False)[0, prompt["input_ids"].shape[1]:]
print(json.dumps({
    "ids": ids,
    "texts": [tokenizer.decode(i) for i in ids],
    "eos": [tokenizer.eos_token, tokenizer.eos_token_id, model.generation_config.eos_token_id],
    "new": new.tolist(),
    "ours": sorted(name for name in sys.modules if name.startswith("bigtrain.")),
}))
"""


@pytest.mark.parametrize(("kind", "name"), [("bpe", "gpt2 tied"), ("bytes", "llama untied grouped")])
def test_a_stranger_opens_it(kind: str, name: str, tmp_path: Path):
    from bigtrain.models.generation import generate

    config = shape(**{**to_dict(MODELS[name]), "vocab_size": 300})
    model = native(config)
    built = give_tokenizer(tmp_path / "run", kind)
    tokenizer, eos_id = built.tokenizer, built.eos_id
    exported(tmp_path, model, config)
    command = [sys.executable, "-I", "-c", STRANGER, json.dumps(TEXTS)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["ours"] == []
    assert found["ids"] == [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert found["texts"] == TEXTS
    assert found["eos"] == [END_OF_TEXT, eos_id, eos_id]
    prompt = tokenizer.encode(TEXTS[0][:9], add_special_tokens=False).ids
    expected = generate(model, prompt, max_new_tokens=4, temperature=0, eos_id=eos_id)
    assert [token for token in found["new"] if token != eos_id] == expected


def test_the_command(tmp_path: Path):
    model, config = native(MODELS["gpt2 tied"]), MODELS["gpt2 tied"]
    save(tmp_path / "run", model, config)
    script = Path(__file__).parents[2] / "launch/export.py"
    command = [sys.executable, str(script), "checkpoint=run", "out=a/b", "dtype=bf16", "max_shard_gb=1e-5"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "in bf16" in result.stdout
    assert len(list((tmp_path / "a/b").glob("model-*.safetensors"))) > 1
    assert opened(tmp_path / "a/b").dtype == torch.bfloat16


# What does not fit


def test_another_model_is_refused_with_all_differences(tmp_path: Path):
    out = exported(tmp_path, native(MODELS["llama tied scaled"]), MODELS["llama tied scaled"])
    changes = {"num_layers": 3, "rope_theta": 10000.0, "rope_scaling": None, "tie_embeddings": False, "num_kv_heads": 2}
    config = shape(**{**to_dict(MODELS["llama tied scaled"]), **changes, "init_from": str(out)})
    with pytest.raises(ConfigError) as caught:
        started(config)
    said = str(caught.value)
    for line in ("model.num_layers: 2 there, 3 here", "model.rope_theta: 500.0 there, 10000.0 here"):
        assert line in said
    for key in ("num_kv_heads", "tie_embeddings", "rope_scaling"):
        assert f"model.{key}: " in said
    assert len(said.splitlines()) == 6
    longer = shape(**{**to_dict(MODELS["llama tied scaled"]), "max_positions": 32, "init_from": str(out)})
    assert torch.equal(started(longer).embed_tokens.weight, native(MODELS["llama tied scaled"]).embed_tokens.weight)


def test_another_architecture_is_refused(tmp_path: Path):
    out = exported(tmp_path, native(MODELS["gpt2 tied"]), MODELS["gpt2 tied"])
    config = shape(**{**to_dict(MODELS["llama tied scaled"]), "init_from": str(out)})
    with pytest.raises(ConfigError, match="is a gpt2, but these settings are a llama"):
        started(config)
    with pytest.raises(ConfigError, match=r"model.init_from='no/such/model'.*local directory"):
        started(shape(init_from="no/such/model"))


def test_files_that_do_not_fit_are_named(tmp_path: Path):
    out = exported(tmp_path, native(MODELS["gpt2 tied"]), MODELS["gpt2 tied"])
    weights = load_file(out / "model.safetensors")
    weights["transformer.ln_f.bias"] = weights["transformer.ln_f.bias"][:5].clone()
    del weights["transformer.h.0.ln_1.weight"]
    save_file(weights, out / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        started(shape(**{**to_dict(MODELS["gpt2 tied"]), "init_from": str(out)}))
    assert "transformer.h.0.ln_1.weight is not in the files" in str(caught.value)
    assert "transformer.ln_f.bias is (5,) in the files, (24,) in this model" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key"),
    [("gpt2 tied", "transformer.h.1.mlp.c_fc.weight"), ("llama tied scaled", "model.layers.0.self_attn.v_proj.weight")],
)
def test_numbers_that_are_not_finite_are_refused_with_their_tensor(name: str, key: str, tmp_path: Path):
    out = exported(tmp_path, native(MODELS[name]), MODELS[name])
    weights = load_file(out / "model.safetensors")
    weights[key][1, 2] = float("inf")
    save_file(weights, out / "model.safetensors")
    with pytest.raises(ConfigError, match=rf"^model.init_from=.*{key} has numbers that are infinite in the published"):
        started(shape(**{**to_dict(MODELS[name]), "init_from": str(out)}))


def test_tensors_of_which_the_native_model_has_no_use_are_named(tmp_path: Path):
    model = MODELS["llama tied scaled"]
    out = exported(tmp_path, native(model), model)
    weights = load_file(out / "model.safetensors")
    for name, rows, said in (
        ("model.layers.0.self_attn.sinks", 3, "no use"),
        ("lm_head.weight", 97, "tie_word_embeddings"),
    ):
        save_file(weights | {name: torch.ones(rows, model.hidden_dim)}, out / "model.safetensors")
        with pytest.raises(ConfigError, match=rf"model.init_from=.*1 tensors do not fit.*{name}.*{said}"):
            started(shape(**{**to_dict(model), "init_from": str(out)}))


def test_files_of_the_bare_decoder_can_be_read(tmp_path: Path):
    model = native(MODELS["gpt2 tied"])
    theirs = opened(exported(tmp_path, model, MODELS["gpt2 tied"]))
    theirs.transformer.save_pretrained(tmp_path / "bare")
    assert "h.0.ln_1.weight" in load_file(tmp_path / "bare/model.safetensors")
    assert_same_logits(started(shape(**{**to_dict(MODELS["gpt2 tied"]), "init_from": str(tmp_path / "bare")})), theirs)


def test_init_from_and_pretrained_exclude_each_other():
    model = ModelConfig(kind=ModelKind.hf, name="gpt2", init_from="gpt2", pretrained=True)
    config = resolve(TrainConfig(model=model))
    (problem,) = [p for p in check(config, world_size=1, local_world_size=1) if "init_from" in p]
    assert "model.pretrained=true" in problem


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory):
    """Values read from files, with what they are as a whole."""
    path = tmp_path_factory.mktemp("slices") / "x.safetensors"
    generator = torch.Generator().manual_seed(0)
    wide, a, b = (torch.randn(size, generator=generator) for size in ((7, 11), (3, 5), (4, 5)))
    save_file({"wide": wide, "a": a, "b": b}, path)
    stored = [StoredTensor(path, name, tuple(t.shape)) for name, t in (("wide", wide), ("a", a), ("b", b))]
    return [
        (Whole(lambda: stored[0].read().t()), wide.t().flatten()),
        (Stacked(tuple(stored[1:])), torch.cat([a, b]).flatten()),
    ]


@settings(deadline=None)
@given(number=st.integers(0, 1), start=st.integers(0, 77), length=st.integers(0, 77))
def test_any_slice_is_that_slice_of_the_whole(slices, number: int, start: int, length: int):
    value, whole = slices[number]
    start = min(start, whole.numel())
    out = torch.full((min(length, whole.numel() - start) + 2,), 7.0)
    value.fill(start, out[1:-1])
    assert torch.equal(out[1:-1], whole[start : start + len(out) - 2])
    assert out[0] == out[-1] == 7.0
