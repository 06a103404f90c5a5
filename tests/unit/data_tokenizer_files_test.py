"""The files of a published tokenizer, from where it was published into a corpus and a run."""

import dataclasses
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bigtrain.config import DataConfig, DataSource, Verify
from bigtrain.data.prepare.corpus import prepare
from bigtrain.data.read.index import read_index
from bigtrain.data.read.tokenizer import build_tokenizer
from bigtrain.errors import DataError
from bigtrain.run.directory import keep_tokenizer

CONTENT = {
    # As nobody's serialiser writes it: what is kept are bytes.
    "tokenizer_config.json": b'{"eos_token":"<|endoftext|>",\r\n   "model_max_length":77, "tokenizer_class":"PreTrainedTokenizerFast"}',
    "special_tokens_map.json": b'{  "eos_token" : "<|endoftext|>" }',
    "chat_template.jinja": b"{% for m in messages %}{{ m.content }}{% endfor %}\r\n",
    "additional_chat_templates/rag.jinja": b"{{ documents }}",
    "tokenizer.model": bytes(range(256)),
    "vocab.json": b"{}",
}
"""Files of the tokenizer, besides tokenizer.json."""
OTHERS = {
    "tokenization_own.py": b"raise SystemExit",
    "model.safetensors": b"",
    "training_args.bin": b"",
    "README.md": b"",
}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    directory = tmp_path / "published"
    for name, content in (CONTENT | OTHERS).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    tokenizer: Tokenizer = build_tokenizer(DataConfig(tokenizer="bytes"), ()).tokenizer
    (directory / "tokenizer.json").write_text(tokenizer.to_str())
    return directory


@pytest.fixture
def config(tmp_path: Path, published: Path) -> DataConfig:
    (tmp_path / "a.txt").write_text("one text")
    (tmp_path / "b.txt").write_text("another")
    path, root = str(tmp_path / "*.txt"), str(tmp_path / "data")
    return DataConfig(source=DataSource.text, path=path, root=root, tokenizer=str(published))


def kept(directory: Path) -> dict[str, bytes]:
    found = [path for path in (directory / "tokenizer").rglob("*") if path.is_file()]
    return {path.relative_to(directory / "tokenizer").as_posix(): path.read_bytes() for path in found}


@pytest.mark.parametrize("on_the_fly", [False, True])
def test_corpus_and_run_have_them_byte_for_byte(config: DataConfig, published: Path, on_the_fly: bool, tmp_path: Path):
    corpus = prepare(dataclasses.replace(config, on_the_fly=on_the_fly), progress=False)
    expected = CONTENT | {"tokenizer.json": (published / "tokenizer.json").read_bytes()}
    assert kept(corpus) == expected
    run = tmp_path / "run"
    for _ in range(2):  # every launch does
        keep_tokenizer(run, corpus)
    assert kept(run) == expected
    assert (run / "tokenizer.json").read_bytes() == (corpus / "tokenizer.json").read_bytes()
    # From a corpus or a run a tokenizer is handed on with them.
    (tmp_path / "published").rename(tmp_path / "gone")
    next_corpus = prepare(dataclasses.replace(config, tokenizer=str(run), root=str(tmp_path / "next")), progress=False)
    assert kept(next_corpus) == expected


def test_they_come_along_from_a_url(config: DataConfig, tmp_path: Path):
    corpus = prepare(config, progress=False)
    path, cache = f"file://{corpus}", str(tmp_path / "cache")
    remote = DataConfig(source=DataSource.prepared, path=path, cache_directory=cache)
    assert kept(prepare(remote, progress=False)) == kept(corpus)
    (corpus / "tokenizer" / "vocab.json").write_bytes(b"[]")
    with pytest.raises(DataError, match=r"tokenizer/vocab\.json: not the tokenizer that the corpus was prepared with"):
        prepare(remote, progress=False)


def test_they_change_no_identity_and_old_corpora_open(config: DataConfig):
    corpus = prepare(config, progress=False)
    index = read_index(corpus)
    values = json.loads((corpus / "index.json").read_text())
    assert values["tokenizer"].pop("published")
    (corpus / "index.json").write_text(json.dumps(values))
    assert read_index(corpus).fingerprint == index.fingerprint
    assert prepare(config, progress=False) == corpus


def test_a_damaged_one_is_named(config: DataConfig):
    corpus = prepare(config, progress=False)
    path = corpus / "tokenizer" / "chat_template.jinja"
    path.write_bytes(path.read_bytes().swapcase())
    with pytest.raises(DataError, match=r"tokenizer/chat_template\.jinja: the content is not what was prepared"):
        prepare(dataclasses.replace(config, verify=Verify.full), progress=False)
    path.unlink()
    with pytest.raises(DataError, match=r"tokenizer/chat_template\.jinja: missing"):
        read_index(corpus)


@pytest.mark.parametrize("name", ["tokenizer/../../x", "/etc/passwd", "tokenizer/a/b", "tokenizer/", "a\\b"])
def test_an_index_points_nowhere_else(config: DataConfig, name: str):
    corpus = prepare(config, progress=False)
    values = json.loads((corpus / "index.json").read_text())
    values["tokenizer"]["published"][0]["name"] = name
    (corpus / "index.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match="is not a plain file name"):
        read_index(corpus, check_sizes=False)


@pytest.mark.parametrize("tokenizer", ["bpe", "bytes"])
def test_our_own_have_none(config: DataConfig, tokenizer: str):
    corpus = prepare(dataclasses.replace(config, tokenizer=tokenizer, tokenizer_vocab_size=260), progress=False)
    assert not (corpus / "tokenizer").exists()
    assert read_index(corpus).tokenizer.published == []
