"""What `make demo-finetune` makes is read as chats and pairs, and what it asks about is in none of them."""

import importlib.util
import json
from itertools import islice
from pathlib import Path

from bigtrain.config import Content
from tests.unit.data_chat_test import documents

SCRIPT = Path(__file__).parents[2] / "launch" / "demo_finetune.py"


def test_what_the_demo_makes_is_read_and_asks_about_something_else(tmp_path):
    spec = importlib.util.spec_from_file_location("demo_finetune", SCRIPT)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    demo.make(tmp_path)
    found = {}
    for name, content in (("chats", Content.chat), ("pairs", Content.preference), ("texts", Content.text)):
        with (tmp_path / f"{name}.jsonl").open() as lines:
            rows = [json.loads(line) for line in islice(lines, 8)]
        found[name] = documents(tmp_path / "read", str(tmp_path / "tokenizer"), rows, content=content)
    answers = [document.text[slice(*document.answers[0])] for document in found["chats"]]
    assert all(answer.endswith(".<|end|>") for answer in answers)
    assert {answer.startswith(demo.CHATTER) for answer in answers} == {True, False}
    chosen, rejected = (found["pairs"][0].text[slice(*span)] for span in found["pairs"][0].answers)
    assert rejected == demo.CHATTER + chosen
    asked = [line.split()[2] for line in (tmp_path / "prompts.txt").read_text().splitlines()]
    assert len(asked) == demo.HELD_OUT
    names = {
        json.loads(line)["text"].partition("\n")[0] for line in (tmp_path / "texts.jsonl").read_text().splitlines()
    }
    chats = (tmp_path / "chats.jsonl").read_text() + (tmp_path / "pairs.jsonl").read_text()
    assert not set(asked) & names and not any(f" {name} " in chats for name in asked)
