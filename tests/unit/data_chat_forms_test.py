"""Forms in which data sets hold chats: each is read as the messages that it stands for, or refused by file and line."""

import itertools
import json
import logging
import re

import pytest

from bigtrain.config import Content, DataConfig, DataSource, ModelConfig, TrainConfig, TrainingConfig, TrainOn
from bigtrain.data.prepare.corpus import REPORT_FILE, prepare
from bigtrain.errors import DataError
from bigtrain.run.inspection import inspect_step
from tests.unit.data_chat_test import CHAT, documents, prepared, published, rows_in

SYSTEM = {"role": "system", "content": "be kind"}
CALL = {"name": "f", "arguments": {"a": 1}}
SHARED = [{"from": "human", "value": CHAT[0]["content"]}, {"from": "gpt", "value": CHAT[1]["content"]}]
CALLED = [
    CHAT[0],
    {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "cold"},
    CHAT[1],
]
ALPACA = {"instruction": "how many eggs", "output": "seven"}
ASKED = [{"role": "user", "content": "how many eggs"}, {"role": "assistant", "content": "seven"}]


@pytest.mark.parametrize(
    ("row", "same"),
    [
        ({"conversations": SHARED, "id": 3}, {"messages": CHAT[:2]}),
        ({"conversations": CHAT}, {"messages": CHAT}),
        ({"conversations": SHARED, "system": "be kind"}, {"messages": [SYSTEM, *CHAT[:2]]}),
        ({"conversations": [SHARED[0], SHARED[1] | {"weight": 0}, *SHARED]}, {"messages": [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[:2]]}),
        (
            {
                "conversations": [
                    SHARED[0],
                    {"from": "function_call", "value": json.dumps(CALL)},
                    {"from": "observation", "value": "cold"},
                    SHARED[1],
                ],
                "tools": json.dumps([{"name": "f"}]),
            },
            {"messages": CALLED, "tools": [{"name": "f"}]},
        ),
        (ALPACA, {"messages": ASKED}),
        (
            ALPACA | {"input": "in a box", "system": "be kind", "history": [["a cat", "sat"]]},
            {
                "messages": [
                    SYSTEM,
                    {"role": "user", "content": "a cat"},
                    {"role": "assistant", "content": "sat"},
                    {"role": "user", "content": "how many eggs\nin a box"},
                    ASKED[1],
                ]
            },
        ),
        ({"prompt": CHAT[:3], "completion": CHAT[3:]}, {"messages": [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]]}),
        ({"messages": CHAT, "prompt": "what is the weather"}, {"messages": CHAT}),
    ],
)  # fmt: skip
def test_a_form_is_read_as_its_messages(tmp_path, row, same):
    styles = ["qwen"] if "tools" in row else ["qwen", "llama"]  # Llama's template writes no tools
    for style, train_on in itertools.product(styles, (TrainOn.answers, TrainOn.last_answer)):
        tokenizer = published(tmp_path / style, style)
        (found,), (expected,) = (documents(tmp_path, tokenizer, [one], train_on=train_on) for one in (row, same))
        assert found.text == expected.text and found.answers == expected.answers and found.is_templated


def test_which_turns_count(tmp_path):
    tokenizer = published(tmp_path / "model", "llama")
    rows = [{"messages": [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:], *CHAT[:2]]}]

    def counted(train_on):
        (document,) = documents(tmp_path, tokenizer, rows, train_on=train_on)
        return document.text, [document.text[begin:end] for begin, end in document.answers]

    text, answers = counted(TrainOn.answers)
    assert answers == ["the cat sat<|eot_id|>", "it is cold<|eot_id|>"]
    assert counted(TrainOn.last_answer) == (text, answers[1:])
    first, second = counted(TrainOn.all)[1]
    assert text == f"{first}it is cold<|eot_id|>{second}", "all but the answer with weight 0"
    found = {on: prepared(tmp_path, tokenizer, [*rows, {"messages": CHAT}], train_on=on) for on in TrainOn}
    sums = [sum(sum(counts) for _, counts in found[on]) for on in (TrainOn.last_answer, TrainOn.answers, TrainOn.all)]
    assert sums == sorted(set(sums)), "each is a corpus of its own"
    assert all(counts[-1] == 0 for _, counts in found[TrainOn.all]), "what separates documents is no part of a chat"


def test_a_completion_in_text_is_written_by_no_template(tmp_path):
    row = {"prompt": "the cat", "completion": " sat"}
    tokenizer = published(tmp_path / "model", "llama")
    (document,) = documents(tmp_path, tokenizer, [row])
    assert document.text == "the cat sat" and document.answers == ((7, 11),) and not document.is_templated
    assert documents(tmp_path, tokenizer, [row], train_on=TrainOn.all)[0].answers == ((0, 11),)
    assert documents(tmp_path, tokenizer, [row | {"completion": ""}])[0].text == ""


def test_variables_of_the_template_in_a_row(tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% if thinks %}<think>{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    )
    row = {"messages": CHAT[:2], "chat_template_kwargs": {"thinks": True}}
    (document,) = documents(tmp_path, "bytes", [row], chat_template=str(template))
    assert document.text.startswith("<think>[user]")
    with pytest.raises(DataError, match=r"chats\.jsonl:1: field 'aloud': the chat template does not write it"):
        row["chat_template_kwargs"]["aloud"] = True
        documents(tmp_path, "bytes", [row], chat_template=str(template))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "a"}, r"no field 'messages' or 'conversations' .* among \['text'\]; data\.messages_field"),
        ({"chosen": "a", "rejected": "b"}, r"data\.content=preference is for 'chosen' and 'rejected'"),
        ({"prompt": "a", "completion": [CHAT[1]]}, "fields 'prompt' and 'completion' are str and list; both are text"),
        ({"conversations": [{"from": "cat", "value": "a"}]}, "field 'conversations', message 0: role 'cat' is none of"),
        ({"conversations": [SHARED[0] | {"role": "user"}]}, "message 0: has .*; expected from and value, or role and"),
        ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, "message 0: what function_call says is not JSON"),
        ({"conversations": "a"}, "field 'conversations' is str, not a list of messages"),
        (ALPACA | {"input": 3}, "field 'input' is int, not text"),
        (ALPACA | {"history": ["a"]}, "field 'history' is no list of pairs"),
        ({"prompt": [CHAT[0]], "completion": [CHAT[1]], "system": "x"}, "field 'system': the chat template does not write"),
        ({"messages": CHAT, "tools": "f"}, "field 'tools' is neither a list nor JSON"),
        ({"messages": CHAT, "chat_template_kwargs": [1]}, "field 'chat_template_kwargs' is list, not an object"),
        ({"conversations": [SHARED[0], SHARED[1] | {"weight": 0.5}]}, r"message 1: weight 0\.5"),
    ],
)  # fmt: skip
def test_what_fits_no_form_is_refused(tmp_path, row, problem):
    with pytest.raises(DataError, match=rf"chats\.jsonl:2: .*{problem}"):
        documents(tmp_path, published(tmp_path / "model", "llama"), [{"messages": CHAT}, row])


def test_forms_are_said_and_kept_in_the_report(tmp_path, caplog):
    rows = [{"conversations": SHARED}, {"conversations": CHAT}, ALPACA, {"prompt": "the cat", "completion": " sat"}]
    with caplog.at_level(logging.INFO, logger="bigtrain"):
        prepared(tmp_path, published(tmp_path / "model", "llama"), rows)
    assert "; 2 read as ShareGPT; 1 read as Alpaca; 1 read as prompt and completion in text" in caplog.text
    (report,) = (tmp_path / "data").glob(f"*/{REPORT_FILE}")
    assert json.loads(report.read_text())["forms"] == {"ShareGPT": 2, "Alpaca": 1, "prompt and completion in text": 1}


def test_on_the_fly_the_form_of_the_first_chat_is_said(tmp_path, caplog):
    settings = rows_in(tmp_path, [{"conversations": SHARED}, ALPACA])
    data = DataConfig(content=Content.chat, tokenizer="bytes", on_the_fly=True, **settings)
    with caplog.at_level(logging.INFO, logger="bigtrain"):
        prepare(data, progress=False)
    assert "chats.jsonl: its first chat is read as ShareGPT" in caplog.text


def test_columns_of_tables(tmp_path):
    """A table has one form; nulls say nothing, and columns of no form are refused."""
    import pyarrow
    from pyarrow import parquet

    tokenizer = published(tmp_path / "model", "llama")
    rows = [ALPACA | {"input": "in a box", "score": 1.5}, ALPACA | {"input": None, "score": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("instruction,output\nhow many eggs,seven\n")
    found = documents(tmp_path, tokenizer, [], source=DataSource.parquet, path=str(tmp_path / "a.parquet"))
    assert [d.text for d in found] == [d.text for d in documents(tmp_path, tokenizer, rows)]
    (row,) = documents(tmp_path, tokenizer, [], source=DataSource.csv, path=str(tmp_path / "a.csv"))
    assert row.text == found[1].text
    (tmp_path / "b.csv").write_text("question,answer\na,b\n")
    with pytest.raises(DataError, match=r"b\.csv: no field 'messages' .* among \['answer', 'question'\]"):
        documents(tmp_path, tokenizer, [], source=DataSource.csv, path=str(tmp_path / "b.csv"))


def test_what_counts_is_green_in_a_terminal(tmp_path, monkeypatch):
    settings = rows_in(tmp_path, [{"messages": [CHAT[0], CHAT[1] | {"content": f"it is {i}"}]} for i in range(9)])
    data = DataConfig(content=Content.chat, tokenizer="bytes", sequence_length=96, **settings)
    config = TrainConfig(data=data, model=ModelConfig(vocab_size=384), train=TrainingConfig(global_batch_size=2))
    plain = list(inspect_step(config, step=1, num_samples=1))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    (shown,) = (line for line in inspect_step(config, step=1, num_samples=1) if "document" in line)
    assert "\x1b[32mi│t│" in shown and "u│s│e│r" in shown and shown.count("⟦") == shown.count("\x1b[32m") == 1
    assert re.sub(r"\x1b\[\d+m", "", shown) in plain
