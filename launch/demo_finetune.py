"""What `make demo-finetune` trains on, made of what the standard library says of itself, and a look at its exports.

python launch/demo_finetune.py make DIRECTORY      texts, a tokenizer, chats, pairs of answers, questions
python launch/demo_finetune.py check DIRECTORY     the exports in transformers and peft
"""

import ast
import json
import random
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ["<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = """\
{% for message in messages %}{% if message.role == 'assistant' %}<|assistant|>\
{% generation %}{{ message.content }}<|end|>{% endgeneration %}\
{% else %}<|user|>{{ message.content }}<|end|>{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>{% endif %}"""
CHATTER = "Great question! I am happy to help you. "
QUESTIONS = ("What does {} do?", "What is {} for?", "Tell me about {}.", "Explain {} to me.")
VOCAB_SIZE, HELD_OUT = 2048, 6


def documented() -> Iterator[tuple[str, str]]:
    """Yield the names of functions, methods and classes of the standard library, and what it says of each."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).with_suffix("")
        if {"test", "tests", "site-packages", "idlelib", "lib2to3"} & set(module.parts) or module.name.startswith("_"):
            continue
        try:
            body = ast.parse(path.read_text(encoding="utf-8")).body
        except (SyntaxError, UnicodeDecodeError):
            continue
        for name, node in named(body, ".".join(module.parts)):
            if text := ast.get_docstring(node):
                yield name, text


def named(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield public functions and classes with their names, each class before what is in it."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{prefix}.{node.name}", node
            yield from named(node.body if isinstance(node, ast.ClassDef) else [], f"{prefix}.{node.name}")


def first_sentence(text: str) -> str | None:
    """Return the first sentence of a text, if it is a short one in English."""
    sentence = " ".join(text.split("\n\n")[0].split()).partition(". ")[0].rstrip(".") + "."
    return sentence if 20 < len(sentence) < 120 and sentence.isascii() else None


def said(role: str, content: str) -> dict[str, str]:
    """Return a message."""
    return {"role": role, "content": content}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(directory: Path) -> None:
    """Write the files."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = sorted(dict(documented()).items(), key=lambda item: zlib.crc32(item[0].encode()))
    asked = [name for name, text in texts if first_sentence(text)][:HELD_OUT]
    texts = [(name, text) for name, text in texts if name not in asked]
    rows = [{"text": f"{name}\n{text}"} for name, text in texts]
    write_lines(directory / "texts.jsonl", rows)
    write_tokenizer(directory / "tokenizer", [row["text"] for row in rows])
    draw, chats, pairs = random.Random(0), [], []
    for name, text in texts:
        sentence = first_sentence(text)
        if sentence is None:
            continue
        for question in QUESTIONS:
            answer = draw.choice(("", CHATTER)) + sentence
            chats.append({"messages": [said("user", question.format(name)), said("assistant", answer)]})
        prompt = [said("user", draw.choice(QUESTIONS).format(name))]
        answers = {"chosen": sentence, "rejected": CHATTER + sentence}
        pairs.append({"prompt": prompt} | {which: [said("assistant", text)] for which, text in answers.items()})
    write_lines(directory / "chats.jsonl", chats)
    write_lines(directory / "pairs.jsonl", pairs)
    prompts = (f"<|user|>{QUESTIONS[0].format(name)}<|end|><|assistant|>" for name in asked)
    (directory / "prompts.txt").write_text("\n".join(prompts) + "\n")
    found = f"{len(rows)} texts, {len(chats)} chats, {len(pairs)} pairs"
    print(f"{found}, and {HELD_OUT} questions about what is in none of them: {directory}")


def write_tokenizer(directory: Path, texts: list[str]) -> None:
    """Write a BPE of these texts, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapper = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    wrapper.chat_template = TEMPLATE
    wrapper.save_pretrained(directory)


def check(directory: Path) -> None:
    """Compare the merged export with the adapter on its base, and have both answer.

    In fp64: in fp32 each of the two is as far from that as they are from one another.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = (directory / "prompts.txt").read_text().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(directory / "merged")
    merged, base = (AutoModelForCausalLM.from_pretrained(directory / name).double() for name in ("merged", "sft"))
    before = {}
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        before[prompt] = base(ids).logits
    adapted = PeftModel.from_pretrained(base, directory / "adapter").double()
    difference = change = 0.0
    with torch.no_grad():
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
            logits = merged(ids).logits
            difference = max(difference, (logits - adapted(ids).logits).abs().max().item())
            change = max(change, (logits - before[prompt]).abs().max().item())
    asked = prompts[0].removeprefix("<|user|>").partition("<|end|>")[0]
    ids = tokenizer.apply_chat_template([said("user", asked)], add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    answer = merged.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)[0]
    print(f"largest difference of logits in fp64, transformers (merged) and peft (adapter): {difference:.1e}")
    print(f"largest change of logits by preferences: {change:.2g}")
    print(f"transformers: {asked}\n  {tokenizer.decode(answer[ids.shape[1] :], skip_special_tokens=True)}")
    if not difference < 1e-5 < change:
        sys.exit("the exports are not one model, or preferences have changed nothing")


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
