"""Chats through their templates: ids and masks are those of transformers, and nothing of a row is dropped."""

import dataclasses
import json

import numpy as np
import pytest

from bigtrain.cli.prepare import run as prepare_by_hand
from bigtrain.config import Content, DataConfig, DataSource, LongChats, TrainConfig
from bigtrain.data.prepare.chat import chat_of
from bigtrain.data.prepare.chat_forms import read_row
from bigtrain.data.prepare.corpus import prepare
from bigtrain.data.read.index import read_index
from bigtrain.errors import DataError
from bigtrain.run.sampling import require_texts
from tests.documents import iterate_documents

SAMPLE = ["the cat sat on a mat", "what is the weather", "it is cold", "user assistant system model", "seven eggs"] * 9
LLAMA = """\
{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>

{{ m['content'] | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
QWEN = """\
{% if messages[0].role != 'system' %}<|im_start|>system
be brief<|im_end|>
{% endif %}{% if tools %}{% for t in tools %}<tools>{{ t | tojson }}</tools>{% endfor %}{% endif %}\
{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}\
{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>{% endgeneration %}\
{% else %}{{ m.content }}<|im_end|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MISTRAL = """\
{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}\
{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"""
GEMMA = """\
{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}{{ p.text | trim }}{% endfor %}\
{% endif %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
PHI = """\
{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}"""
STYLES = {
    "llama": (LLAMA, ["<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "qwen": (QWEN, ["</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]),
    "mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"]),
    "gemma": (GEMMA, ["<s>", "</s>", "<start_of_turn>", "<end_of_turn>"]),
    "phi": (PHI, ["</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]),
}
"""Mistral's is SentencePiece-like, the others byte-level."""
CHAT = [
    {"role": "user", "content": "what is the weather"},
    {"role": "assistant", "content": "it is cold"},
    {"role": "user", "content": "on a mat "},
    {"role": "assistant", "content": "the cat sat"},
]


def published(directory, style, template="own"):
    """Save a tokenizer in the style of a model; return its directory."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    own, names = STYLES[style]
    tokenizer = Tokenizer(models.BPE(byte_fallback=style == "mistral", unk_token=None))
    if style == "mistral":
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(spaces), decoders.Metaspace()
        tokenizer.pre_tokenizer, alphabet = pre_tokenizers.Split("▁", "merged_with_next"), []
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(name, special=True, normalized=False, rstrip=name == "<|end|>") for name in names]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=9
    )
    tokenizer.train_from_iterator(SAMPLE, trainer)
    if style == "mistral":
        tokenizer.pre_tokenizer = None  # as Llama 2: no token has a space inside, although nothing cuts words
    roles = {"eos_token": "</s>"}
    if "<s>" in names:
        roles["bos_token"] = "<s>"
        bos = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="$A $B", special_tokens=[bos])
    wrapper = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    wrapper.chat_template = own if template == "own" else template
    wrapper.save_pretrained(directory)
    return str(directory)


def rows_in(directory, rows):
    directory.mkdir(exist_ok=True)
    (directory / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"source": DataSource.jsonl, "path": str(directory / "chats.jsonl"), "root": str(directory / "data")}


def prepared(directory, tokenizer, rows, **changes):
    """Prepare rows; return ids and counts of each document, separator included."""
    settings = {"content": Content.chat, "tokenizer": tokenizer, **rows_in(directory, rows)} | changes
    corpus = prepare(DataConfig(**settings), progress=False)
    index, found = read_index(corpus), []
    for shard in (*index.train.shards, *index.validation.shards):
        tokens = np.fromfile(corpus / shard.tokens.name, dtype=index.dtype)
        counted = np.fromfile(corpus / shard.counted.name, np.uint8) if shard.counted else np.ones_like(tokens)
        ends = np.load(corpus / shard.documents.name)[1:-1]
        found += [
            (t.tolist(), c.tolist()) for t, c in zip(np.split(tokens, ends), np.split(counted, ends), strict=True)
        ]
    return found


def documents(directory, tokenizer, rows, **changes):
    settings = {"content": Content.chat, "tokenizer": tokenizer, **rows_in(directory, rows)} | changes
    return list(iterate_documents(DataConfig(**settings)))


def right(tokenizer, messages, **row):
    """Return ids and counts by transformers: of marked spans, else of what follows each prompt."""
    from transformers import AutoTokenizer

    wrapper = AutoTokenizer.from_pretrained(tokenizer)
    if "endgeneration" in wrapper.chat_template:
        done = wrapper.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True, **row)
        return done["input_ids"], done["assistant_masks"]
    ids, counts = wrapper.apply_chat_template(messages, return_dict=False), []
    for number, message in enumerate(messages):
        upto = wrapper.apply_chat_template(messages[: number + 1], return_dict=False)
        if message["role"] == "assistant":
            asked = wrapper.apply_chat_template(messages[:number], add_generation_prompt=True, return_dict=False)
            counts += [0] * (len(asked) - len(counts))
        if number + 1 < len(messages) and upto[-1] == wrapper.eos_token_id != ids[len(upto) - 1]:
            upto.pop()  # Phi's, which ends a chat that nothing follows
        counts += [int(message["role"] == "assistant")] * (len(upto) - len(counts))
    return ids, counts


@pytest.mark.parametrize("style", STYLES)
def test_ids_and_counts_are_those_of_transformers(tmp_path, style):
    tokenizer = published(tmp_path / "model", style)
    chats = [CHAT, CHAT[2:], [CHAT[0], CHAT[3]], [CHAT[2], {"role": "assistant", "content": "naïve 東 🙂 "}]]
    found = dict(
        (tuple(ids[:-1]), counts)
        for ids, counts in prepared(tmp_path, tokenizer, [{"messages": chat} for chat in chats])
    )
    assert len(found) == len(chats)
    for chat in chats:
        ids, counts = right(tokenizer, chat)
        assert found[tuple(ids)] == [*counts, 0], "what separates documents is no part of an answer"
        assert 0 < sum(counts) < len(counts)


def test_several_processes_and_a_template_of_ones_own_write_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("bigtrain.data.prepare.sources._PART_BYTES", 600)
    tokenizer = published(tmp_path / "model", "llama", template=None)
    template = tmp_path / "own.jinja"
    template.write_text(LLAMA)
    rows = [{"messages": [CHAT[0] | {"content": f"the cat {i}"}, CHAT[1]]} for i in range(40)]
    with pytest.raises(DataError, match=r"no chat template.*data\.chat_template=<file"):
        prepared(tmp_path / "none", tokenizer, rows)
    given = {"chat_template": str(template)}
    found = prepared(tmp_path / "many", tokenizer, rows, prepare_processes=2, **given)
    assert found == prepared(tmp_path / "one", tokenizer, rows, prepare_processes=1, **given)
    own = prepared(tmp_path / "with", published(tmp_path / "other", "llama"), rows)
    assert found == own and len(found) == 40
    (corpus,) = (path.parent for path in (tmp_path / "one" / "data").glob("*/index.json"))
    assert (corpus / "tokenizer" / "chat_template.jinja").read_text() == LLAMA, "an export says what was trained"
    template.write_text(LLAMA.replace("trim", "upper"))
    assert prepared(tmp_path / "one", tokenizer, rows, prepare_processes=1, **given) != found, "another corpus"
    copied = prepared(tmp_path / "again", str(corpus), rows)
    assert copied == found, "the tokenizer of a corpus brings the template along"


def test_what_a_template_marks_or_writes_in_other_ways(tmp_path):
    tokenizer = published(tmp_path / "model", "qwen")
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    thought = {"role": "assistant", "content": "cold", "reasoning_content": "it is"}
    rows = [
        {"messages": [CHAT[0], call, {"role": "tool", "content": "cold"}, CHAT[1]], "tools": [{"name": "f"}]},
        {"messages": [CHAT[0], thought, CHAT[2], thought], "id": 7},
        {"messages": [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[2], CHAT[3] | {"weight": 1}]},
    ]
    found = dict((tuple(ids[:-1]), counts[:-1]) for ids, counts in prepared(tmp_path, tokenizer, rows))
    ids, counts = right(tokenizer, rows[0]["messages"], tools=rows[0]["tools"])
    assert found[tuple(ids)] == counts
    ids, counts = right(tokenizer, rows[1]["messages"])
    assert found[tuple(ids)] == counts
    ids, counts = right(tokenizer, CHAT)
    last = len(counts) - counts[::-1].index(1)
    first = max(i for i in range(last) if not counts[i])
    assert found[tuple(ids)] == [int(first < i < last) for i in range(len(ids))]


def test_weights_without_marks(tmp_path):
    rows = [{"messages": [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]]}]
    (document,) = documents(tmp_path, published(tmp_path / "model", "llama"), rows)
    assert [document.text[a:b] for a, b in document.answers] == ["the cat sat<|eot_id|>"]
    assert documents(tmp_path, "bytes", rows)[0].answers == (
        documents(tmp_path, "bytes", [{"messages": CHAT}])[0].answers[1],
    )


ANSWER = CHAT[1]
CALLS = ANSWER | {"tool_calls": [{"id": "1", "function": {"name": "f"}}, {"function": {"name": "g"}, "note": "x"}]}


@pytest.mark.parametrize(
    ("style", "row", "problem"),
    [
        ("llama", {"messages": [CHAT[0], ANSWER | {"tool_calls": [{"function": {}}]}]}, "message 1: .*tool_calls"),
        ("llama", {"messages": [CHAT[0], ANSWER | {"reasoning_content": "x"}]}, "message 1: .*reasoning_content"),
        ("llama", {"messages": [CHAT[0] | {"name": "bob"}, ANSWER]}, "message 0: .*does not write its name"),
        ("llama", {"messages": [CHAT[0], ANSWER | {"train": False}]}, "message 1: .*train"),
        ("qwen", {"messages": [CHAT[0], CALLS]}, r"message 1: .*does not write its tool_calls\[1\]\.note"),
        ("qwen", {"messages": [CHAT[0], ANSWER], "tools": [{}, "x"]}, "JSON schema"),
        ("llama", {"messages": [CHAT[0], ANSWER], "tools": [{"name": "f"}]}, "field 'tools'"),
        ("llama", {"messages": [CHAT[0], ANSWER], "system": "be kind"}, "field 'system'"),
        ("llama", {"messages": [CHAT[0] | {"content": [{"type": "text", "text": "x"}]}, ANSWER]}, "takes text only"),
        ("gemma", {"messages": [CHAT[0] | {"content": [{"type": "image", "url": "x"}]}, ANSWER]}, "image"),
        ("gemma", {"messages": [CHAT[0] | {"content": [{"type": "text", "text": "x", "cache": 1}]}, ANSWER]}, "cache"),
        ("qwen", {"messages": [CHAT[0], ANSWER | {"weight": 0.5}]}, r"weight 0\.5"),
        ("qwen", {"messages": [CHAT[0] | {"weight": 1}, ANSWER]}, "weight 1"),
        ("qwen", {"messages": [CHAT[0], ANSWER], "documents": [{"title": "a"}]}, "field 'documents'"),
        ("mistral", {"messages": [{"role": "system", "content": "x"}, CHAT[0], ANSWER]}, "roles must alternate"),
    ],
)
def test_what_a_template_would_drop_is_refused(tmp_path, style, row, problem):
    with pytest.raises(DataError, match=rf"chats\.jsonl:2: .*{problem}"):
        documents(tmp_path, published(tmp_path / "model", style), [{"messages": [CHAT[0], ANSWER]}, row])


def test_ids_that_tie_a_result_to_its_call_need_not_be_written(tmp_path):
    calls = ANSWER | {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}]}
    result = {"role": "tool", "tool_call_id": "1", "content": "cold"}
    rows = [{"messages": [CHAT[0], calls, other, ANSWER]} for other in (result, result | {"note": "x"})]
    tokenizer = published(tmp_path / "model", "qwen")
    assert "cold" in documents(tmp_path, tokenizer, rows[:1])[0].text
    with pytest.raises(DataError, match=r"message 2: .*does not write its note; remove it, or"):
        documents(tmp_path, tokenizer, rows[1:])


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages if m.role != 'tool' %}{{ m.content }}\n{% endfor %}", "message 1: .*its content"),
        ("{% for m in messages %}{{ 'x' * messages | length }}{{ m.content }}{% endfor %}", "message 2: .*generation"),
        ("{% for m in messages %}{{ m.content }}", "data.chat_template.*not valid"),
        ("{{ messages[0].__class__.mro() }}", "cannot write it"),
    ],
)
def test_templates_that_drop_messages_or_rewrite_what_is_before(tmp_path, template, problem):
    path = tmp_path / "own.jinja"
    path.write_text(template)
    # What the tool says is also in the answer: a text that has it somewhere need not have it from this message.
    messages = [CHAT[0], {"role": "tool", "content": "cold"}, CHAT[1], CHAT[2]]
    with pytest.raises(DataError, match=problem):
        documents(tmp_path, "bytes", [{"messages": messages}], chat_template=str(path))


def test_reasoning_that_a_template_leaves_out_of_earlier_answers(tmp_path):
    """Without marks, what counts is not known; with marks it is as the template wants it."""
    thought = {"role": "assistant", "content": "cold", "reasoning_content": "it is"}
    inner = "{% if loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>"
    own = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}INNER{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    rows = [{"messages": [CHAT[0], thought, CHAT[2], thought]}]
    with pytest.raises(DataError, match=r"chats\.jsonl:1: .*message 1: .*\{% generation %\}.*data.chat_template=FILE"):
        documents(tmp_path, published(tmp_path / "bare", "qwen", own.replace("INNER", inner)), rows)
    marked = own.replace("INNER", "{% generation %}" + inner + "{% endgeneration %}")
    (document,) = documents(tmp_path, published(tmp_path / "marked", "qwen", marked), rows)
    assert [document.text[a:b] for a, b in document.answers] == ["cold<|im_end|>", "<think>it is</think>cold<|im_end|>"]


def test_the_date_of_a_template_is_that_of_the_preparation(tmp_path):
    tokenizer = published(tmp_path / "model", "llama", "{{ strftime_now('%d %b %Y') }}\n" + LLAMA)
    chat = chat_of(tokenizer, None)
    assert len(chat.date) == 10
    frozen = type(chat)(chat.templates, chat.tokens, "2024-07-26")
    assert frozen.write(read_row({"messages": CHAT}, "messages"))[0].startswith("26 Jul 2024\n<s>")
    assert chat_of(published(tmp_path / "other", "llama"), None).date == ""


def test_rows_of_tables(tmp_path):
    """Nulls that a table holds because other rows have the field say nothing; columns of a chat are read."""
    import pyarrow
    from pyarrow import parquet

    tokenizer = published(tmp_path / "model", "qwen")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    other = {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"b": "x"}}}]}
    rows = [{"messages": [CHAT[0], m], "tools": [{"name": n}], "score": 1} for m, n in ((call, "f"), (other, "g"))]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    tables = {"source": DataSource.parquet, "path": str(tmp_path / "a.parquet")}
    found = documents(tmp_path, tokenizer, rows, **tables)
    assert [d.text for d in found] == [d.text for d in documents(tmp_path, tokenizer, rows)]
    assert '<call>{"name": "g", "arguments": {"b": "x"}}</call>' in found[1].text and "<tools>" in found[1].text


def test_nothing_that_counts_is_said(tmp_path):
    rows = [{"messages": [CHAT[0] | {"content": str(i)}, ANSWER | {"weight": 0}]} for i in range(4)]
    with pytest.raises(DataError, match=r"chats\.jsonl: no target that counts: nothing is answered \(by the assistant"):
        prepared(tmp_path, published(tmp_path / "model", "qwen"), rows)
    assert documents(tmp_path, "bytes", [{"messages": None}])[0].text == ""


def test_empty_answers_that_count_are_counted_and_named(tmp_path, caplog):
    caplog.set_level("INFO", logger="bigtrain")

    def chat(answer, i):
        return {"messages": [CHAT[0] | {"content": f"question {i}"}, answer]}

    caplog.set_level("INFO", logger="bigtrain")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    answers = [ANSWER, ANSWER | {"content": " "}, ANSWER | {"content": "", "weight": 0}, call, ANSWER | {"content": ""}]
    prepared(tmp_path, published(tmp_path / "model", "qwen"), [chat(answer, i) for i, answer in enumerate(answers)])
    assert "2 chats with an empty answer that counts, such as chats.jsonl:2: only what ends it is learnt" in caplog.text
    assert "1 document without an answer that counts left out, such as chats.jsonl:3" in caplog.text
    (report,) = tmp_path.glob("data/*/report.json")
    assert json.loads(report.read_text())["empty_answers"]["documents"] == 2


@pytest.mark.parametrize("content", [Content.chat, Content.text])
def test_prompts_to_a_model_of_chats_are_continued_as_they_stand_which_is_said(content, tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("what is the weather\n")
    config = TrainConfig(data=DataConfig(content=content))
    config.validation.prompts = str(tmp_path / "prompts.txt")
    require_texts(config, tmp_path)
    assert ("validation.prompts are continued as they stand" in caplog.text) is (content is Content.chat)


def test_chats_that_are_too_long_are_refused_when_they_are_prepared(tmp_path):
    rows = [{"messages": [CHAT[0] | {"content": f"question {i} " * 20}, ANSWER]} for i in range(4)]
    source = rows_in(tmp_path, rows)
    config = DataConfig(
        content=Content.chat, tokenizer="bytes", long_chats=LongChats.refuse, sequence_length=64, **source
    )
    with pytest.raises(DataError, match=r"chats? of more than data\.sequence_length=64 tokens in the train"):
        prepare_by_hand(TrainConfig(data=config))
    prepare_by_hand(TrainConfig(data=dataclasses.replace(config, sequence_length=1024)))


def test_pairs_and_texts_have_the_ids_of_the_whole(tmp_path):
    from transformers import AutoTokenizer

    pairs = [{"prompt": "the cat sat", "answer": " on a mat"}, {"prompt": "it is ", "answer": "cold"}]
    fields = {"content": Content.pairs}
    long = " ".join(SAMPLE * 40)[:140_000] + "é" * 3
    for style in ("mistral", "llama", "qwen"):
        tokenizer = published(tmp_path / style, style)
        wrapper = AutoTokenizer.from_pretrained(tokenizer)
        found = dict(
            (tuple(ids[:-1]), counts) for ids, counts in prepared(tmp_path / style, tokenizer, pairs, **fields)
        )
        for pair in pairs:
            done = wrapper(pair["prompt"] + pair["answer"], return_offsets_mapping=True)
            answered = [int(end > len(pair["prompt"])) for _, end in done["offset_mapping"]]
            assert found[tuple(done["input_ids"])] == [*answered, 1], "that the answer ends is learnt"
        texts = [{"text": long}, {"text": "a </s> b"}, {"text": "the cat"}]
        found = {
            tuple(ids[:-1]) for ids, _ in prepared(tmp_path / f"{style}-text", tokenizer, texts, content=Content.text)
        }
        assert found == {tuple(wrapper(row["text"])["input_ids"]) for row in texts}


@pytest.mark.parametrize(("style", "prompt"), [("mistral", "the cat"), ("llama", "the cat"), ("phi", "the cat ")])
def test_a_continuation_keeps_the_space_at_the_seam(tmp_path, style, prompt):
    from bigtrain.data.read.tokenizer import build_tokenizer
    from bigtrain.run.sampling import continuation, prompt_ids

    built = build_tokenizer(DataConfig(tokenizer=published(tmp_path, style)), ())
    ids = prompt_ids(built.tokenizer, prompt, adds_special=True)
    assert (built.tokenizer.id_to_token(ids[0]) == "<s>") is (style != "phi"), "BOS where the tokenizer writes it"
    new_ids = built.tokenizer.encode(f"{prompt} sat on", add_special_tokens=True).ids[len(ids) :]
    assert prompt + continuation(built.tokenizer, ids, new_ids) == f"{prompt} sat on"


def test_a_prompt_does_not_end_as_a_text_does(tmp_path):
    from tokenizers import processors

    from bigtrain.data.read.tokenizer import build_tokenizer
    from bigtrain.run.sampling import prompt_ids

    tokenizer = build_tokenizer(DataConfig(tokenizer=published(tmp_path, "llama")), ()).tokenizer
    special = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", "$A $B", special)
    whole = tokenizer.encode("the cat").ids
    assert prompt_ids(tokenizer, "the cat", adds_special=True) == whole[:-1]
    assert prompt_ids(tokenizer, "the</s>", adds_special=True)[-1] == special[1][1], "what the user writes stays"


def test_a_pretrained_model_ends_a_text_as_its_own_settings_say(tmp_path):
    from bigtrain.run.sampling import end_ids

    prepared(tmp_path, published(tmp_path / "base", "llama"), [{"messages": CHAT}, {"messages": CHAT[:2]}])
    (run,) = (path.parent for path in (tmp_path / "data").glob("*/index.json"))
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    (run / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4]}))
    assert end_ids(run, is_pretrained=True) == {1, 4} and end_ids(run, is_pretrained=False) == {1}


def test_a_question_to_a_run_is_what_its_template_writes(tmp_path):
    from transformers import AutoTokenizer

    from bigtrain.run.sampling import asked

    def question(tokenizer, **data):
        prepared(
            tmp_path, tokenizer, [{"messages": CHAT}, {"messages": CHAT[:2]}], root=str(tmp_path / tokenizer), **data
        )
        (run,) = (path.parent for path in (tmp_path / tokenizer).glob("*/index.json"))
        return asked(run, TrainConfig(data=DataConfig(tokenizer=tokenizer, **data)), "what is it")

    base, own = published(tmp_path / "base", "llama"), tmp_path / "own.jinja"
    messages = [{"role": "user", "content": "what is it"}]
    wrapper = AutoTokenizer.from_pretrained(base)
    assert question(base) == wrapper.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    own.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert question("bytes", chat_template=str(own)) == "user: what is it\n"
