"""A run of a Hugging Face model stands alone, and its export is its base wherever the run has changed nothing."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bigtrain.config import Content, DataConfig, DataSource, ModelConfig, ModelKind, Precision, RunConfig, TrainConfig
from bigtrain.data.prepare.corpus import prepare
from bigtrain.data.read.index import read_index
from bigtrain.errors import ConfigError, DataError
from bigtrain.models import build_model
from bigtrain.run.data import with_own_tokenizer
from bigtrain.run.directory import continued_model, own_model, read_config, write_run_files
from bigtrain.run.export import export
from tests.hf_families import FAMILIES, build_family
from tests.unit.hf_export_test import save, started

TOKENS = ("<|begin|>", "<|end|>", "<|turn|>", "<|fill|>")
TEXT = "how many eggs are there, text user assistant: seven of sixty, which is not very long 0123456789 <|>"
TEMPLATE = "{% for m in messages %}{{ bos_token + m.role + ': ' + m.content }}<|turn|>{% endfor %}\r\n"
SETTINGS = {"bos_token": "<|begin|>", "eos_token": "<|turn|>", "pad_token": "<|fill|>"}
CHAT = [{"role": "user", "content": "how many eggs"}, {"role": "assistant", "content": "seven <|end|>"}]
GENERATION = b'{"eos_token_id":[1, 2],  "bos_token_id":0,\n\n "do_sample":true, "temperature":0.6, "top_p":0.9}'
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TOKENS_BT = torch.arange(3, 99)[None] % 97


def write_tokenizer(directory: Path, roles: dict[str, str]) -> None:
    """Write the files of a tokenizer, formatted as no program of ours would."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=90, special_tokens=list(TOKENS), show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    (directory / "tokenizer.json").write_text(json.dumps(json.loads(tokenizer.to_str()), indent=7))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 77, **roles}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=5))
    (directory / "special_tokens_map.json").write_text(json.dumps(roles, separators=(" ,", " :")))
    (directory / "chat_template.jinja").write_bytes(TEMPLATE.encode())


def write_base(directory: Path, family: str = "llama", **settings) -> transformers.PreTrainedModel:
    """Write a published model, its settings in the form of transformers 4."""
    model = build_family(family)
    model.save_pretrained(directory)
    config = FAMILIES[family] | {"bos_token_id": 0, "eos_token_id": [1, 2], "torch_dtype": "float32", "own": "stays"}
    config["architectures"] = [type(model).__name__]
    if rope := config.pop("rope_parameters", None):
        config["rope_theta"] = rope["rope_theta"]
        config |= {"rope_scaling": {key: value for key, value in rope.items() if key != "rope_theta"}}
        config |= {"rotary_pct": 0.5, "rotary_emb_base": 5000.0, "rope_scaling": None} if family == "gpt_neox" else {}
    (directory / "config.json").write_text(json.dumps(config | settings))
    (directory / "generation_config.json").write_bytes(GENERATION)
    write_tokenizer(directory, SETTINGS)
    return model


def make_run(tmp_path: Path, base: Path, *, tokenizer: str | None = None, pretrained: bool = True) -> SimpleNamespace:
    """Leave what a training of no steps leaves; then its base goes away and the run elsewhere."""
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"text {name}")
    data = DataConfig(source=DataSource.text, path=str(tmp_path / "*.txt"), root=str(tmp_path / "data"))
    data.tokenizer = tokenizer or str(base)
    model = ModelConfig(kind=ModelKind.hf, name=str(base), pretrained=pretrained)
    corpus = prepare(data, progress=False)
    config = TrainConfig(model=model, data=data, run=RunConfig(root=str(tmp_path / "runs"), name="x"))
    write_run_files(config, corpus)
    built = started(model)
    save(config.run.directory, built, model)
    shutil.move(config.run.directory, tmp_path / "moved")
    shutil.move(base, tmp_path / "gone")
    places = {"directory": tmp_path / "moved", "base": tmp_path / "gone", "corpus": corpus}
    return SimpleNamespace(**places, model=built.causal_lm, config=config)


def exported(run: SimpleNamespace, **fields) -> Path:
    out = run.directory.with_name("out")
    export(run.directory, out, max_shard_bytes=10**9, **{"precision": Precision.fp32, **fields})
    return out


def differences(base: Path, out: Path, *, same_values: bool) -> list[str]:
    """Return in what an exported directory is not its base."""
    names = {path.name for path in (*base.iterdir(), *out.iterdir())} - {"config.json", "model.safetensors"}
    found = [n for n in sorted(names) if not all((d / n).is_file() for d in (base, out))]
    found += [n for n in sorted(names) if n not in found and (base / n).read_bytes() != (out / n).read_bytes()]
    was, now = (json.loads((directory / "config.json").read_text()) for directory in (base, out))
    found += [f"config.{key}" for key in sorted(was.keys() | now.keys()) if was.get(key) != now.get(key)]
    was, now = (load_file(directory / "model.safetensors") for directory in (base, out))
    found += sorted(was.keys() ^ now.keys())
    if same_values:
        found += [name for name in was.keys() & now.keys() if not torch.equal(was[name], now[name])]
    return found


@torch.no_grad()
def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS_BT, use_cache=False).logits


@pytest.mark.parametrize(("family", "pretrained"), [("llama", True), ("mixtral", False), ("gpt_neox", False)])
def test_an_export_is_its_base(family: str, pretrained: bool, tmp_path: Path):
    write_base(tmp_path / "base", family)
    run = make_run(tmp_path, tmp_path / "base", pretrained=pretrained)
    out = exported(run)
    assert differences(run.base, out, same_values=pretrained) == []
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(theirs), logits(run.model), rtol=0, atol=1e-6)
    assert theirs.generation_config.eos_token_id == [1, 2]
    ours, base = (transformers.AutoTokenizer.from_pretrained(directory) for directory in (out, run.base))
    assert ours.apply_chat_template(CHAT, tokenize=False) == base.apply_chat_template(CHAT, tokenize=False)
    assert ours(CHAT[1]["content"])["input_ids"] == base(CHAT[1]["content"])["input_ids"]
    (out / "chat_template.jinja").write_bytes(TEMPLATE.replace("\r\n", "\n").encode())
    assert differences(run.base, out, same_values=pretrained) == ["chat_template.jinja"], "the comparison sees nothing"


def test_a_base_without_generation_defaults_gets_none(tmp_path: Path):
    write_base(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").unlink()
    run = make_run(tmp_path, tmp_path / "base")
    assert differences(run.base, exported(run), same_values=True) == []


def test_code_and_quantisation_of_a_base_are_not_handed_on(tmp_path: Path):
    write_base(tmp_path / "base", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (tmp_path / "base" / "own.py").write_text("raise SystemExit('executed')")
    run = make_run(tmp_path, tmp_path / "base")
    assert not list(run.directory.rglob("*.py"))
    assert differences(run.base, exported(run), same_values=True) == ["own.py", "config.auto_map"]


def test_weights_in_bf16_are_said_to_be(tmp_path: Path):
    write_base(tmp_path / "base", dtype="float32")
    run = make_run(tmp_path, tmp_path / "base")
    out = exported(run, precision=Precision.bf16)
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


# Tokens


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ({"eos_token": "<|fill|>"}, (0, 3, None)),
        (SETTINGS, (0, [1, 2], 3)),
        ({"eos_token": {"content": "<|end|>"}, "bos_token": {"content": "<|turn|>"}}, (2, [1, 2], None)),
    ],
)
def test_another_published_tokenizer_says_its_own_tokens(roles: dict, expected: tuple, tmp_path: Path):
    write_base(tmp_path / "base")
    (tmp_path / "other").mkdir()
    write_tokenizer(tmp_path / "other", roles)
    out = exported(make_run(tmp_path, tmp_path / "base", tokenizer=str(tmp_path / "other")))
    assert {name: (out / name).read_bytes() for name in FILES} == {
        n: (tmp_path / "other" / n).read_bytes() for n in FILES
    }
    config, generation = (json.loads((out / f"{n}config.json").read_text()) for n in ("", "generation_"))
    assert tuple(config[f"{role}_token_id"] for role in ("bos", "eos", "pad")) == expected
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["top_p"]) == (*expected[:2], 0.9)


def test_a_tokenizer_of_our_own_has_one_special_token_and_no_padding(tmp_path: Path):
    write_base(tmp_path / "base", vocab_size=300)
    (tmp_path / "base" / "model.safetensors").unlink()
    out = exported(make_run(tmp_path, tmp_path / "base", tokenizer="bytes", pretrained=False))
    config = json.loads((out / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (256, 256, None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert (tokenizer.eos_token_id, tokenizer.pad_token) == (256, None)
    assert tokenizer("<|endoftext|>")["input_ids"] == list(b"<|endoftext|>")


def test_a_damaged_file_of_the_tokenizer_is_named(tmp_path: Path):
    write_base(tmp_path / "base")
    run = make_run(tmp_path, tmp_path / "base")
    (run.directory / "tokenizer" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer/tokenizer_config\.json: 2 bytes, index\.json says"):
        exported(run)


# Standing alone


def test_stored_buffers_stay_with_the_run(tmp_path: Path):
    base = write_base(tmp_path / "base", "deepseek_v3")
    base.save_pretrained(tmp_path / "base", save_original_format=False)
    run = make_run(tmp_path, tmp_path / "base")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    with torch.device("meta"):
        built = build_model(read_config(run.directory).model).causal_lm
    assert built.state_dict()[bias].abs().min() > 0
    assert torch.equal(built.state_dict()[bias], base.state_dict()[bias])
    assert torch.equal(load_file(exported(run) / "model.safetensors")[bias], base.state_dict()[bias])


def test_a_run_with_a_checkpoint_goes_on_with_its_own_description(tmp_path: Path):
    write_base(tmp_path / "base")
    run = make_run(tmp_path, tmp_path / "base")
    own = dataclasses.replace(run.config.model, name=str(run.directory / "model"))
    named = run.config.model
    assert own_model(named, run.directory) == continued_model(named, run.directory) == own
    assert read_config(run.directory).model == own
    assert read_config(run.directory).run == RunConfig(root=str(tmp_path), name="moved")
    assert build_model(own).causal_lm.config.rope_parameters == run.model.config.rope_parameters
    # Named anew, where it is the same; as another one it is refused.
    renamed = dataclasses.replace(named, name=str(run.base))
    assert continued_model(renamed, run.directory) == own
    config = json.loads((run.base / "config.json").read_text())
    (run.base / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    with pytest.raises(ConfigError, match=r"gone: another model than that of .*moved.*; rope_parameters differ"):
        continued_model(renamed, run.directory)
    # Without a checkpoint nothing has been trained: what is named counts.
    shutil.rmtree(run.directory / "checkpoints")
    assert continued_model(renamed, run.directory) is renamed


def test_a_tokenizer_that_is_gone_is_the_same_from_the_run(tmp_path: Path):
    write_base(tmp_path / "base")
    run = make_run(tmp_path, tmp_path / "base")
    data = with_own_tokenizer(run.config.data, run.directory)
    assert data.tokenizer == str(run.directory)
    assert prepare(data, progress=False) == run.corpus
    # Where the corpus is not, it becomes the same.
    anew = dataclasses.replace(data, root=str(tmp_path / "anew"))
    expected, found = (read_index(directory) for directory in (run.corpus, prepare(anew, progress=False)))
    assert (found.identity, found.fingerprint) == (expected.identity, expected.fingerprint)
    assert found.tokenizer == expected.tokenizer
    # One that is there, or another one, stays what is named.
    for name in (str(run.base), "another/one", "bytes"):
        other = dataclasses.replace(run.config.data, tokenizer=name)
        assert with_own_tokenizer(other, run.directory) is other


def test_a_chat_template_that_is_gone_is_the_same_from_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_base(tmp_path / "base")
    template, chats = tmp_path / "own.jinja", tmp_path / "chats.jsonl"
    template.write_text(TEMPLATE.replace("'", '"'))
    chats.write_text(
        "\n".join(json.dumps({"messages": [CHAT[0] | {"content": f"eggs {i}"}, CHAT[1]]}) for i in range(9))
    )
    data = DataConfig(source=DataSource.jsonl, path=str(chats), content=Content.chat, root=str(tmp_path / "data"))
    data = dataclasses.replace(data, tokenizer=str(tmp_path / "base"), chat_template=str(template))
    corpus, run = prepare(data, progress=False), RunConfig(root=str(tmp_path / "runs"), name="x")
    config = TrainConfig(model=ModelConfig(kind=ModelKind.hf, name=str(tmp_path / "base")), data=data, run=run)
    write_run_files(config, corpus)
    assert with_own_tokenizer(data, run.directory) is data, "it is there"
    template.rename(tmp_path / "moved.jinja")
    found = with_own_tokenizer(data, run.directory)
    assert found.chat_template == str(run.directory / "tokenizer/chat_template.jinja")
    assert "own.jinja is not there" in caplog.text
    assert prepare(found, progress=False) == corpus
    # Another one that is not there is not the run's.
    other = dataclasses.replace(data, chat_template=str(tmp_path / "other.jinja"))
    assert with_own_tokenizer(other, run.directory) is other
    with pytest.raises(DataError, match=r"data.chat_template=.*other.jinja: cannot be read"):
        prepare(other, progress=False)


def test_a_run_from_before_is_opened_by_the_name_of_its_base(tmp_path: Path):
    write_base(tmp_path / "base")
    run = make_run(tmp_path, tmp_path / "base")
    shutil.rmtree(run.directory / "model")
    assert read_config(run.directory).model == run.config.model
    with pytest.raises(ConfigError, match="neither a directory with a config"):
        exported(run)
    shutil.copytree(run.base, tmp_path / "base")
    assert differences(run.base, exported(run), same_values=True) == []
