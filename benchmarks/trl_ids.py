"""Write the ids and labels that TRL's SFTTrainer makes of chats in every form, with which ``data_trl_test.py`` compares.

    pip install trl && python benchmarks/trl_ids.py tests/unit/trl_ids.json

Templates are those that TRL has for known models, as they were published and as it changes them for training.
"""

import copy
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from trl.data_utils import maybe_convert_to_chatml

SPECIAL = {
    "qwen3": ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "phi3": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"],
    "gemma3": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
}
BOS = {"llama3": "<|begin_of_text|>", "gemma3": "<bos>"}
EOS = {"qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "phi3": "<|endoftext|>", "gemma3": "<end_of_turn>"}
TEXT = "what is the weather like today? it is cold, and the cat sat on a mat with seven eggs. {} 3 4 tools " * 20
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "the weather", "parameters": {"type": "object"}},
}


def said(role: str, content: Any, **others: Any) -> dict[str, Any]:
    """Return a message."""
    return {"role": role, "content": content, **others}


CHAT = [
    said("user", "what is the weather?"),
    said("assistant", "it is cold "),
    said("user", "on a mat"),
    said("assistant", "naïve 東"),
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"day": "today"}}}
PARTS = [{"type": "text", "text": "the cat"}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "every": [
        {"messages": CHAT},
        {"messages": CHAT[:2]},
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in CHAT]},
        {"prompt": CHAT[:1], "completion": CHAT[1:2]},
        {"prompt": CHAT[:3], "completion": CHAT[3:]},
        {"prompt": "the cat", "completion": " sat on a mat"},
        {"prompt": "it is c", "completion": "old"},
    ],
    "qwen3": [
        {"messages": [CHAT[0], said("assistant", "", tool_calls=[CALL]), said("tool", "cold"), CHAT[1]], "tools": [TOOL]},
        {"messages": [said("system", "be kind"), CHAT[0], said("assistant", "cold", reasoning_content="it is")]},
    ],
    "gemma3": [{"messages": [said("user", PARTS), said("assistant", PARTS)]}],
    "llama3": [{"messages": [said("system", "be kind"), *CHAT]}],
}  # fmt: skip
THE_SAME = [
    (
        {"instruction": "how many eggs", "input": "on a mat", "output": "seven"},
        {"prompt": [said("user", "how many eggs\non a mat")], "completion": [said("assistant", "seven")]},
    ),
    (
        {"conversations": [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "cold"}]},
        {"messages": [said("user", "what is it?"), said("assistant", "cold")]},
    ),
]
"""Rows that TRL does not read, and those that it does for the same chat."""


def build_tokenizer() -> Tokenizer:
    """Return a small byte-level BPE with the special tokens of all templates."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = [AddedToken(name, special=True, normalized=False) for names in SPECIAL.values() for name in names]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained = trainers.BpeTrainer(vocab_size=360, special_tokens=names, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trained)
    return tokenizer


def wrapped(tokenizer: Tokenizer, family: str, template: str) -> Any:
    """Return it as transformers' class, which writes the beginning of a text where its model does."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    roles = {"eos_token": EOS[family], "pad_token": EOS[family]}
    if family in BOS:
        roles["bos_token"] = BOS[family]
        special = [(BOS[family], tokenizer.token_to_id(BOS[family]))]
        single = f"{BOS[family]} $A"
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **roles)


def prepared(row: dict[str, Any], tokenizer: Any, *, answers_only: bool) -> dict[str, Any]:
    """Return ids and labels of one row, alone in its data set, as TRL prepares it."""
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **small))
    with tempfile.TemporaryDirectory() as directory:
        arguments = trl.SFTConfig(
            output_dir=directory,
            max_length=None,
            assistant_only_loss=answers_only,
            shuffle_dataset=False,
            use_cpu=True,
            bf16=False,
            report_to=[],
        )
        rows = Dataset.from_list([row])
        trainer = trl.SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    return trainer.train_dataset[0]


def cases(family: str, template: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Return rows, and what TRL makes of them, where it can: with the loss of answers, and by default."""
    found = []
    own = [(row, row) for row in ROWS["every"] + ROWS.get(family, [])]
    for row, theirs in own + THE_SAME:
        is_text = isinstance(theirs.get("prompt"), str)
        # Qwen 3's own template leaves out earlier reasoning; in its place TRL trains on answers with one that does not.
        for answers_only in (False,) if is_text or template == "qwen3" else (True, False):
            if answers_only:  # for which TRL does not convert ShareGPT's form by itself
                theirs = maybe_convert_to_chatml(copy.deepcopy(theirs))
            done = prepared(theirs, tokenizer, answers_only=answers_only)
            counts = [int(label != -100) for label in done["labels"]]
            train_on = "answers" if answers_only or "prompt" in theirs else "all"
            found.append(
                {"row": row, "template": template, "train_on": train_on, "ids": done["input_ids"], "counts": counts}
            )
    return found


def main() -> None:
    """Write the file."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    own = build_tokenizer()
    places = Path(trl.__file__).parent / "chat_templates"
    known: dict[str, Any] = {
        "trl": trl.__version__,
        "tokenizer": json.loads(own.to_str()),
        "families": {},
        "templates": {},
    }
    known["cases"] = []
    for family in SPECIAL:
        known["families"][family] = {"bos_token": BOS.get(family), "eos_token": EOS[family]}
        for template in (family, f"{family}_training"):
            text = (places / f"{template}.jinja").read_text()
            known["templates"][template] = text
            known["cases"] += cases(family, template, wrapped(own, family, text))
    Path(sys.argv[1]).write_text(
        json.dumps(known, ensure_ascii=False, separators=(",", ":")).replace('{"row"', '\n{"row"') + "\n"
    )
    print(f"TRL {trl.__version__}: {len(known['cases'])} cases")


if __name__ == "__main__":
    main()
