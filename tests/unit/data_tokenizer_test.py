import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config import DataConfig
from bigtrain.data.prepare.survey import cut
from bigtrain.data.read.tokenizer import END_OF_TEXT, build_tokenizer, load_tokenizer, num_ids
from bigtrain.errors import DataError

SAMPLE = ["def add(a, b):\n    return a + b\n", "class Thing:\n\tpass\r\n", "naïve café — 東京 🙂\n"] * 20
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def build(tokenizer, **changes):
    return build_tokenizer(DataConfig(tokenizer=tokenizer, **changes), SAMPLE)


BUILT = {"bpe": build("bpe", tokenizer_vocab_size=400), "bytes": build("bytes")}


@pytest.mark.parametrize("kind", BUILT)
@given(text=texts)
@settings(deadline=None)
def test_decoding_gives_back_any_text(kind, text):
    tokenizer, eos_id, *_ = BUILT[kind]
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert eos_id not in ids


@pytest.mark.parametrize("kind", BUILT)
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    tokenizer, eos_id, *_ = BUILT[kind]
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    text = f"  two spaces\r\n{END_OF_TEXT} is text here \x00\x7f\u200b 🙂"
    ids = loaded.encode(text, add_special_tokens=False).ids
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    assert eos_id not in ids
    assert loaded.decode(ids) == text
    assert loaded.decode([*ids, eos_id], skip_special_tokens=False) == text + END_OF_TEXT
    assert loaded.decode([*ids, eos_id]) == text


def test_ids_of_the_bytes_tokenizer_are_the_bytes():
    tokenizer, eos_id, *_ = BUILT["bytes"]
    text = "aé東🙂\n\x00"
    assert tokenizer.encode(text).ids == list(text.encode())
    assert (eos_id, num_ids(tokenizer)) == (256, 257)


def test_bpe_has_the_size_asked_for_and_is_the_same_every_time():
    small = build("bpe", tokenizer_vocab_size=280)
    assert num_ids(small.tokenizer) == 280
    assert small.tokenizer.to_str() == build("bpe", tokenizer_vocab_size=280).tokenizer.to_str()
    reordered = build_tokenizer(DataConfig(tokenizer="bpe", tokenizer_vocab_size=280), SAMPLE[::-1])
    assert small.tokenizer.to_str() == reordered.tokenizer.to_str()


@pytest.mark.parametrize("kind", BUILT)
def test_long_texts_are_cut_without_changing_the_ids(kind):
    tokenizer = BUILT[kind].tokenizer
    text = "".join(f"    value_{i} = {i}\n\n\n# naïve {'x' * (i % 50)}!\ndef f():\n" for i in range(8000))
    pieces = list(cut(text))
    assert len(pieces) > 2 and "".join(pieces) == text
    ids = [i for piece in pieces for i in tokenizer.encode(piece).ids]
    assert ids == tokenizer.encode(text).ids


def test_text_without_lines_is_cut_too():
    assert [len(piece) for piece in cut("x" * 300_000)] == [131072, 131072, 37856]
    assert list(cut("")) == [""]


def test_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer(tmp_path)
    for content in ("", "{}", "[1, 2", '{"version": "1.0"}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
            load_tokenizer(tmp_path)


def save_hugging_face(directory, **special_tokens):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=BUILT["bpe"].tokenizer, **special_tokens).save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("splits", [False, True])
def test_hugging_face_tokenizer_from_a_directory(tmp_path, splits):
    """Whether the name of a special token in a text is that token or text is said by the tokenizer itself."""
    from transformers import AutoTokenizer

    directory = save_hugging_face(tmp_path, eos_token=END_OF_TEXT, split_special_tokens=splits)
    tokenizer, eos_id, adds_special = built = build(directory)
    assert (eos_id, adds_special, built.reads_special) == (BUILT["bpe"].eos_id, True, not splits)
    for text in (SAMPLE[0], f"a{END_OF_TEXT} b"):
        assert tokenizer.encode(text).ids == AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    assert (eos_id in tokenizer.encode(END_OF_TEXT).ids) is not splits


def test_unsuitable_hugging_face_tokenizers_are_errors_with_a_way_out(tmp_path):
    with pytest.raises(DataError, match=r"no such tokenizer here or on the Hugging Face hub; use bpe, bytes"):
        build(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: the directory is there, but no tokenizer can be loaded from it"):
        build(str(tmp_path / "empty"))
    with pytest.raises(DataError, match="no end-of-text token"):
        build(save_hugging_face(tmp_path))


@pytest.mark.parametrize(
    ("kind", "file", "package"),
    [
        ("BertJapaneseTokenizer", "vocab.txt", "fugashi"),
        ("XLMTokenizer", "vocab.json", "sacremoses"),
        ("T5Tokenizer", "spiece.model", "sentencepiece"),
    ],
)
def test_a_package_that_a_tokenizer_needs_is_named(tmp_path, monkeypatch, kind, file, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / file).write_text("{}")
    (tmp_path / "merges.txt").write_text("#version")
    config = {"tokenizer_class": kind, "word_tokenizer_type": "mecab"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=rf"it is there, but needs .*{package}") as raised:
        build(str(tmp_path))
    assert "no such tokenizer" not in str(raised.value) and "\n" not in str(raised.value)
