"""Preferences beside adapters: two passes through sharded networks, equal under every engine."""

import dataclasses
import json
import re

import pytest

from bigtrain.config import AdapterConfig, Content, DataConfig, DataSource, EngineKind, PreferenceLoss, TaskConfig
from bigtrain.config.check import check, resolve
from bigtrain.testing.parity import Case, compare, compute, configure, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.launches import fork
from tests.distributed.ranks import small_config

pytest.importorskip("peft")
ENGINES = ("ddp", "fsdp", "zero2", "zero3")


def preferring(root, loss=PreferenceLoss.dpo, adapter=True):
    (root / "pairs.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"say {n}", "chosen": f"{n}, gladly" * (n % 3 + 1), "rejected": "no" * (n % 5 + 1)})
            + "\n"
            for n in range(60)
        )
    )
    shape = {"vocab_size": 257, "max_positions": 96, "adapter": AdapterConfig(rank=4) if adapter else None}
    config = small_config("ddp", model=shape)
    config.data = DataConfig(
        source=DataSource.jsonl,
        path=str(root / "pairs.jsonl"),
        root=str(root / "data"),
        content=Content.preference,
        tokenizer="bytes",
    )
    config.task = TaskConfig(kind="preference", loss=loss)
    return resolve(config)


def trace_all(config, engines):
    return [trace(configure(config, Case(EngineKind[engine], 2, 2))) for engine in engines]


@pytest.mark.parametrize(("loss", "adapter", "engines"), [("dpo", True, ENGINES), ("orpo", False, ("fsdp", "zero3"))])
def test_engines_agree(tmp_path, loss, adapter, engines):
    config = preferring(tmp_path, PreferenceLoss[loss], adapter)
    assert check(config, world_size=2, local_world_size=2) == []
    reference = compute(config, Case(EngineKind.ddp, 1, 4))
    if loss == "dpo":
        assert reference.losses[0] == pytest.approx(0.6931472, abs=1e-6), "adapters begin as their base"
    for engine, found in zip(engines, run_ranks(trace_all, 2, config, engines, timeout_seconds=280)[0], strict=True):
        difference = compare(found, reference)
        # Gradients are differences of two answers' that nearly cancel.
        assert difference.loss <= 1e-6 and difference.grad_norm <= 5e-6, (engine, difference)


def test_what_has_no_reference_is_refused(tmp_path):
    config = preferring(tmp_path, adapter=False)
    assert any("+adapter=lora" in problem for problem in check(config, world_size=1, local_world_size=1))
    text = dataclasses.replace(config, data=dataclasses.replace(config.data, content=Content.chat))
    assert any("data.content=preference" in problem for problem in check(text, world_size=1, local_world_size=1))


def test_inspect_data_shows_what_is_compared(tmp_path):
    rows = [
        {"prompt": f"say {n}", "chosen": "yes", "rejected": "no", "completion": "yes", "label": n > 1} for n in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["+model=gpt_nano", "model.vocab_size=257", "model.max_positions=96", "task=preference", "data=jsonl"]
    settings += ["data.path=rows.jsonl", "data.tokenizer=bytes", "train.global_batch_size=1", "samples=1"]
    for content, loss, told in (
        ("preference", "orpo", ("chosen", "rejected")),
        ("rated", "kto", ("good|bad", "another prompt's")),
    ):
        more = [f"data.content={content}", f"task.loss={loss}", *(["+adapter=lora"] if loss == "kto" else [])]
        shown = fork("inspect_data.py", *settings, *more, cwd=tmp_path)
        assert shown.code == 0, shown.err
        for line, what in zip(shown.out.splitlines()[-2:], told, strict=True):
            assert re.match(f" *({what}): document 0: ", line)
