"""Ids and what counts of chats in every form are those of TRL's SFTTrainer, as ``benchmarks/trl_ids.py`` has kept them."""

import json
from pathlib import Path

import pytest

from bigtrain.config import TrainOn
from tests.unit.data_chat_test import prepared

KNOWN = json.loads(Path(__file__).with_name("trl_ids.json").read_text())
GROUPS = sorted({(case["template"], case["train_on"]) for case in KNOWN["cases"]})


def tokenizer_in(directory, template):
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(json.dumps(KNOWN["tokenizer"]))
    roles = {k: v for k, v in KNOWN["families"][template.removesuffix("_training")].items() if v}
    if bos := roles.get("bos_token"):
        special = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    wrapper = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    wrapper.chat_template = KNOWN["templates"][template]
    wrapper.save_pretrained(directory / "model")
    return str(directory / "model")


@pytest.mark.parametrize(("template", "train_on"), GROUPS)
def test_ids_and_what_counts_are_those_of_trl(tmp_path, template, train_on):
    tokenizer = tokenizer_in(tmp_path, template)
    cases = [case for case in KNOWN["cases"] if (case["template"], case["train_on"]) == (template, train_on)]
    found = prepared(tmp_path, tokenizer, [case["row"] for case in cases], train_on=TrainOn[train_on])
    assert len(found) == len(cases)
    for case in cases:
        expected = case["ids"], case["counts"]
        is_text = isinstance(case["row"].get("prompt"), str)  # its end is a target, that of a template is its own
        both = found if is_text else [(ids[:-1], counts[:-1]) for ids, counts in found]
        assert expected in both, case["row"]
