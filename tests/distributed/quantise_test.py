"""Exports in fewer bits and of several checkpoints together."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.launches import fork

pytest.importorskip("torchao")
SETTINGS = [
    *("+model=llama3_1b", "model.hidden_dim=32", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1"),
    *("model.head_dim=16", "model.ffn_dim=48", "model.vocab_size=384", "model.max_positions=32", "data=text"),
    *(
        "data.path=corpus.txt",
        "data.tokenizer=bytes",
        "train.steps=6",
        "train.global_batch_size=4",
        "optimizer.lr=1e-2",
    ),
    *("scheduler.warmup_steps=1", "checkpoint.every_steps=2", "checkpoint.keep=all", "validation.every_steps=6"),
]


def weights(directory):
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def test_exports_in_fewer_bits_say_what_they_cost_and_several_checkpoints_are_averaged(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"{n} sheep jump over {n % 7} fences" * 4 for n in range(90)))

    def export(*settings):
        return fork("export.py", *settings, cwd=tmp_path)

    for name, shape in (("llama", []), ("gpt", ["+model=gpt_nano", "model.num_layers=1"])):
        settings = [setting for setting in SETTINGS if not shape or not setting.startswith(("+", "model."))]
        done = fork("train.py", *shape, *settings, f"run.name={name}", cwd=tmp_path)
        assert done.code == 0, done.err
    assert export("checkpoint=runs/llama", "out=whole").code == 0
    done = export("checkpoint=runs/llama", "out=int8", "quantise=int8")
    assert done.code == 0, done.err
    before, after = (float(word) for word in done.out.partition("loss")[2].split()[:6] if word[0].isdigit())
    assert after == pytest.approx(before, abs=0.02)
    whole, int8 = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("whole", "int8"))
    tokens = torch.arange(32).view(1, 32)
    difference = (whole(tokens).logits - int8(tokens).logits).abs().max()
    assert 0 < difference < 0.05 * whole(tokens).logits.abs().max()
    described = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "int8")]
    assert described[1].pop("quantization_config")["quant_method"] == "torchao"
    assert described[0] == described[1]
    refused = export("checkpoint=runs/gpt", "out=gpt", "quantise=int8")
    assert refused.code == 2 and "GPT2LMHeadModel has none" in refused.err
    assert not (tmp_path / "gpt").exists()

    assert export("checkpoint=runs/llama", "out=mean", "average=3").code == 0
    for step in (2, 4):
        assert export(f"checkpoint=runs/llama/checkpoints/step-{step:08d}", f"out=step{step}").code == 0
    parts = [weights(tmp_path / name) for name in ("step2", "step4", "whole")]
    for name, mean in weights(tmp_path / "mean").items():
        assert torch.allclose(mean, torch.stack([part[name] for part in parts]).mean(dim=0), atol=1e-7), name
    refused = export("checkpoint=runs/llama", "out=four", "average=4")
    assert refused.code == 2 and "has 2 before step-00000006" in refused.err
