import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigtrain.config import DataConfig, DataSource
from bigtrain.data.prepare.encoder import agrees, fast_encoder, slow_encoder
from bigtrain.data.prepare.sources import source_parts
from bigtrain.data.prepare.survey import cut
from bigtrain.data.read.tokenizer import END_OF_TEXT, build_tokenizer
from tests.documents import iterate_documents

SAMPLE = ["def add(a, b):\n    return a + b\n", "class Thing:\n\tpass\r\n", "naïve café — 東京 🙂 aaaa bbbbb\n"] * 20
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def changed(change):
    """Return the trained tokenizer after ``change`` has edited its JSON."""
    from tokenizers import Tokenizer

    values = json.loads(BUILT["bpe"].to_str())
    change(values)
    tokenizer = Tokenizer.from_str(json.dumps(values))
    tokenizer.encode_special_tokens = True
    return tokenizer


def split_like_llama(values):
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = values["pre_tokenizer"] | {"use_regex": False}
    values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}


def shuffle_ids(values):
    vocab = values["model"]["vocab"]
    values["model"]["vocab"] = dict(zip(vocab, sorted(vocab.values(), key=lambda i: i * 7919 % 401), strict=True))
    values["added_tokens"][0]["id"] = values["model"]["vocab"][END_OF_TEXT]


def make_two_ways(values):
    """Add a second pair that makes a token which has one."""
    model = values["model"]
    left, right = next(merge for merge in model["merges"] if len(merge[0]) > 1)
    rest = left[1:] + right
    model["vocab"].setdefault(rest, len(model["vocab"]))
    model["merges"].append([left[0], rest])


BUILT = {
    kind: build_tokenizer(DataConfig(tokenizer=kind, tokenizer_vocab_size=400), SAMPLE).tokenizer
    for kind in ("bpe", "bytes")
}
BUILT |= {"llama": changed(split_like_llama), "other ids": changed(shuffle_ids)}
ENCODERS = {kind: (fast_encoder(tokenizer), slow_encoder(tokenizer)) for kind, tokenizer in BUILT.items()}
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200) | st.text("ab '\n\t1e\r é🙂", max_size=60)


@pytest.mark.parametrize("kind", BUILT)
@given(text=texts)
@settings(deadline=None, max_examples=200)
def test_ids_are_those_of_the_tokenizers_library(kind, text):
    fast, slow = ENCODERS[kind]
    assert fast(text).tolist() == slow(text).tolist()


def test_ids_are_the_same_on_real_text():
    """Half a megabyte of the embedded corpus, with a BPE trained on part of it."""
    config = DataConfig(source=DataSource.stdlib, tokenizer_vocab_size=2000)
    documents = [document.text for document, _ in zip(iterate_documents(config), range(40), strict=False)]
    tokenizer = build_tokenizer(config, documents[::3]).tokenizer
    fast, slow = fast_encoder(tokenizer), slow_encoder(tokenizer)
    pieces = [piece for text in documents for piece in cut(text)]
    assert sum(map(len, pieces)) > 400_000 and agrees(fast, slow, pieces)
    assert len(source_parts(config)) > 2


def test_every_character_of_the_basic_plane_belongs_to_the_same_words():
    fast, slow = ENCODERS["bpe"]
    characters = [chr(i) for i in range(0x10000) if not 0xD800 <= i < 0xE000]
    for start in range(0, len(characters), 8192):
        text = "".join(f"a{c}1{c} {c}b" for c in characters[start : start + 8192])
        assert np.array_equal(fast(text), slow(text))


def test_the_name_of_a_special_token_is_text():
    fast, slow = ENCODERS["bpe"]
    assert fast(END_OF_TEXT).tolist() == slow(END_OF_TEXT).tolist() and len(fast(END_OF_TEXT)) > 1


@pytest.mark.parametrize("reads", [False, True])
@given(text=texts, places=st.lists(st.integers(0, 200), max_size=3))
@settings(deadline=None)
def test_special_tokens_around_and_inside_a_text(reads, text, places):
    from tokenizers import processors

    for place in places:
        text = text[:place] + END_OF_TEXT + text[place:]
    tokenizer = changed(lambda values: None)
    tokenizer.encode_special_tokens = not reads
    around = f"{END_OF_TEXT} $A {END_OF_TEXT}"
    tokenizer.post_processor = processors.TemplateProcessing(around, "$A $B", [(END_OF_TEXT, 0)])
    fast, slow = (build(tokenizer, adds_special=True) for build in (fast_encoder, slow_encoder))
    assert fast(text).tolist() == slow(text).tolist() == tokenizer.encode(text).ids
    assert (0 in fast(text)[1:-1]) is (reads and END_OF_TEXT in text)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.update(normalizer={"type": "NFC"}),
        lambda values: values["pre_tokenizer"].update(add_prefix_space=True),
        lambda values: values.update(pre_tokenizer={"type": "Whitespace"}),
        lambda values: values["model"].update(dropout=0.1),
        lambda values: values["added_tokens"].append(values["added_tokens"][0] | {"special": False, "id": 5}),
        make_two_ways,
    ],
)
def test_other_tokenizers_are_left_to_their_library(change):
    assert fast_encoder(changed(change)) is None


def test_a_tokenizer_that_only_looks_alike_is_found_out():
    """A merge that is never reached in the library: tiktoken would join its bytes all the same."""

    def unreachable(values):
        vocab = values["model"]["vocab"]
        for token in ("zq", "qj"):
            vocab[token] = len(vocab)
        vocab["zqj"] = len(vocab)
        # "qj" comes first, so "zq" + "j" never meets; yet the bytes of "z" + "qj" are those of "zqj".
        values["model"]["merges"] += [["q", "j"], ["z", "q"], ["zq", "j"]]

    tokenizer = changed(unreachable)
    fast, slow = fast_encoder(tokenizer), slow_encoder(tokenizer)
    assert not agrees(fast, slow, ["a zqj b"]) and agrees(fast, slow, SAMPLE)
