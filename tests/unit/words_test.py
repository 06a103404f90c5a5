"""Words, special tokens and the mask of tokenizers of all three kinds."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers

from bigtrain.data.read.tokenizer import _train_bpe, mask_token_id, special_ids, starts_word


def starts(tokenizer, text):
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return dict(zip(encoding.tokens, starts_word(tokenizer)[encoding.ids].tolist(), strict=True))


def test_byte_level(tmp_path):
    built = _train_bpe(["the cat sat on the mat"] * 50, 270)
    found = starts(built.tokenizer, "the catXé, on")
    assert found["Ġcat"] and found[","] and not found["X"], found
    assert special_ids(built.tokenizer) == [built.eos_id]
    assert mask_token_id(built.tokenizer, tmp_path) is None


def word_piece():
    vocab = {token: i for i, token in enumerate(["[UNK]", "[CLS]", "[MASK]", "un", "##happy", "day", ","])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[MASK]"])
    return tokenizer


def test_word_piece(tmp_path):
    tokenizer = word_piece()
    assert starts(tokenizer, "unhappy, day") == {"un": True, "##happy": False, ",": True, "day": True}
    assert special_ids(tokenizer) == [0, 1, 2]
    assert mask_token_id(tokenizer, tmp_path) == 2
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": "day"}}))
    assert mask_token_id(tokenizer, tmp_path) == 5


def test_sentence_piece():
    vocab = [("<unk>", 0.0), ("▁good", -1.0), ("ness", -2.0), ("▁", -3.0), ("!", -4.0)]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    assert starts(tokenizer, "goodness!") == {"▁good": True, "ness": False, "!": True}
