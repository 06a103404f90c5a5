"""Reward models: their loss is that of whole texts, alike under every engine, and their export is a classifier."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from bigtrain.config import Head
from bigtrain.models.hf.heads import HFNetwork
from bigtrain.tasks.base import IGNORE_INDEX
from bigtrain.tasks.reward import Reward
from tests.distributed.launches import events, fork, trajectory

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def test_the_loss_is_that_of_whole_texts_and_padding_counts_for_nothing():
    torch.manual_seed(0)
    network = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1, pad_token_id=0)).eval()
    pairs = [([5, 6, 7], [8, 9, 2], [11, 2]), ([7], [3, 2], [4, 4, 4, 2])]  # prompt, chosen, rejected

    def rows(which: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, targets = torch.zeros(3, 8, dtype=torch.int64), torch.full((3, 8), IGNORE_INDEX)
        for row, pair in enumerate(pairs):
            prompt, answer = pair[0], pair[which]
            text = torch.tensor(prompt + answer)
            tokens[row, : len(text) - 1] = text[:-1]
            targets[row, len(prompt) - 1 : len(text) - 1] = text[len(prompt) :]
        return tokens, targets

    sums = Reward()(HFNetwork(network, Head.sequence_classification), *rows(1), *rows(2))
    with torch.no_grad():
        rewards = [[float(network(torch.tensor([pair[0] + pair[i]])).logits) for i in (1, 2)] for pair in pairs]
    losses = [float(-F.logsigmoid(torch.tensor(chosen - rejected))) for chosen, rejected in rewards]
    assert sums.tolist() == pytest.approx(
        [
            sum(losses),
            2,
            sum(c > r for c, r in rewards),
            sum(c - r for c, r in rewards),
            *map(sum, zip(*rewards, strict=True)),
        ],
        rel=1e-5,
    )


def test_engines_agree_on_a_reward_model_that_learns_and_its_export_is_a_classifier(tmp_path):
    rows = [{"prompt": f"say {n}", "chosen": f"{n}, gladly", "rejected": "no" * (n % 5 + 1)} for n in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        *(
            "+model=hf",
            "model.architecture=llama",
            "task=reward",
            "data=jsonl",
            "data.content=preference",
            "data.validation_fraction=0.1",
        ),
        *(f"model.settings.{name}={value}" for name, value in SHAPE.items()),
        *("data.path=pairs.jsonl", "data.tokenizer=bytes", "data.sequence_length=96", "train.global_batch_size=5"),
        *("train.steps=20", "optimizer.lr=1e-2", "scheduler.warmup_steps=2", "validation.every_steps=20"),
    ]
    for engine, world_size in (("ddp", 1), ("fsdp", 2)):
        done = fork(
            "train.py", *settings, f"engine={engine}", f"run.name={engine}", cwd=tmp_path, world_size=world_size
        )
        assert done.code == 0, done.err
    one, other = (trajectory(tmp_path / "runs" / engine) for engine in ("ddp", "fsdp"))
    assert [loss for _, loss, *_ in other] == pytest.approx(
        [loss for _, loss, *_ in one], rel=1e-5, abs=1e-6
    )  # it falls to 0
    assert one[-1][1] < one[0][1] / 2
    assert events(tmp_path / "runs/fsdp", "validation")[-1]["accuracy"] == 1
    assert fork("export.py", "checkpoint=runs/fsdp", "out=exported", cwd=tmp_path).code == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    good, bad = (
        float(model(**tokenizer(f"say 3{text}", return_tensors="pt")).logits) for text in ("3, gladly", "nono")
    )
    assert good > bad
