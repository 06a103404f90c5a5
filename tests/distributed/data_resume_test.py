"""Killed with -9 at a random step and resumed at another world size, a run consumes the very same samples."""

import json
import random
import sys
from pathlib import Path

import pytest

from bigtrain.checkpoint.store import find_checkpoints, read_run_state
from bigtrain.config import DataConfig, DataSource
from bigtrain.data.prepare.corpus import prepare
from tests.distributed.launches import SMALL, TRAIN, Launch, Result, events, fork, metrics, num_steps

STEPS = 40
MIXTURE = [
    "+model=gpt_nano",
    *[setting for setting in SMALL[1:] if not setting.startswith(("data=", "model.vocab_size", "train.steps"))],
    f"train.steps={STEPS}",
    "model.vocab_size=257",
    "data=jsonl",
    "data.tokenizer=bytes",
    "data.packing=best_fit",
    "data.document_mask=true",
    "data.validation_fraction=0.1",
    "data.prepare_processes=1",
    "data.mixture.web.path=web.jsonl",
    "data.mixture.code.path=code.jsonl",
    "data.mixture.code.weight=0.4",
    "data.mixture.code.later_weights=[{step:20,weight:1.5}]",
    "checkpoint.every_steps=4",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with texts and an uninterrupted run on one rank."""
    cwd = tmp_path_factory.mktemp("mixture")
    generator = random.Random(0)
    for name in ("web", "code"):
        texts = [f"{name} {i} " + "x" * generator.randrange(40) for i in range(120)]
        (cwd / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = train(cwd, "run.name=whole")
    assert result.code == 0, result.err
    return cwd


def train(cwd: Path, *args: str, world_size: int = 1) -> Result:
    return fork("train.py", *MIXTURE, *args, cwd=cwd, world_size=world_size)


def digests(run: Path) -> list[str]:
    return [record["data_digest"] for record in metrics(run)]


def test_a_killed_run_goes_on_with_the_same_samples_at_another_world_size(whole: Path):
    run, kill_after = whole / "runs/killed", random.randrange(8, STEPS // 2)
    with Launch([sys.executable, TRAIN, *MIXTURE, "run.name=killed", "train.log_every_steps=1"], whole) as running:
        running.wait_until(lambda: num_steps(run) >= kill_after)
    assert num_steps(run) < STEPS
    result = train(whole, "run.name=killed", world_size=2)
    assert result.code == 0, result.err
    assert events(run, "resume")[0]["world_size"] == 2 and events(run, "resume")[0]["step"] >= 4
    assert digests(run) == digests(whole / "runs/whole"), f"killed after {kill_after}"
    assert [record["loss"] for record in metrics(run)] == pytest.approx(
        [record["loss"] for record in metrics(whole / "runs/whole")], rel=1e-4
    )
    assert len(set(digests(run))) == STEPS
    assert all(record["data_wait_seconds"] >= 0 for record in metrics(run))
    state = read_run_state(find_checkpoints(run)[-1])
    assert state.data.digest == digests(run)[-1] and sum(state.data.counts.values()) == state.samples == STEPS * 8


def test_on_the_fly_a_killed_run_goes_on_with_the_same_samples(whole: Path):
    texts = [f"live {i} " + "x" * (i * 7 % 40) for i in range(20)]
    (whole / "live.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    live = ["data.mixture.web.path=live.jsonl", "data.mixture.web.on_the_fly=true"]
    result = train(whole, *live, "run.name=live", world_size=2)
    assert result.code == 0, result.err
    run, kill_after = whole / "runs/live-killed", random.randrange(8, STEPS // 2)
    with Launch([sys.executable, TRAIN, *MIXTURE, *live, "run.name=live-killed"], whole) as running:
        running.wait_until(lambda: num_steps(run) >= kill_after)
    assert num_steps(run) < STEPS
    result = train(whole, *live, "run.name=live-killed", world_size=2)
    assert result.code == 0, result.err
    assert events(run, "resume")[0]["world_size"] == 2 and events(run, "resume")[0]["step"] >= 4
    assert digests(run) == digests(whole / "runs/live"), f"killed after {kill_after}"
    places = read_run_state(find_checkpoints(run)[-1]).data.places
    assert set(places) == {"web"} and places["web"].window > 2, "otherwise this shows little"
    result = fork("inspect_data.py", "directory=runs/live-killed", "step=7", "samples=8", cwd=whole)
    assert result.code == 0 and " web " in result.out and " code " in result.out, result.err
    assert "(<|endoftext|>) l│i│v│e│ │" in result.out
    # The same number of bytes, but not the same text: nothing but its content tells.
    (whole / "live.jsonl").write_text((whole / "live.jsonl").read_text().replace("xx", "xy"))
    result = train(whole, *live, "run.name=live-killed", f"train.steps={STEPS + 4}")
    assert result.code == 2 and "so the text itself has" in result.err, result.err


def test_other_data_goes_on_only_when_that_is_wanted(whole: Path):
    more = ["run.name=whole", f"train.steps={STEPS + 4}"]
    for change, said in (
        (["data.mixture.code.weight=0.5"], "trained on other data"),
        (["train.seed=7"], "would not have had the samples"),
    ):
        result = train(whole, *more, *change)
        assert result.code == 2 and said in result.err and "data.allow_change=true" in result.err, result.err
        key, value = change[0].split("=")
        assert f"  {key}: " in result.err and f" -> {value}" in result.err, result.err
    result = train(whole, *more, "data.mixture.code.weight=0.5", "data.allow_change=true")
    assert result.code == 0, result.err
    state = read_run_state(find_checkpoints(whole / "runs/whole")[-1])
    assert (state.step, state.data.origin_samples) == (STEPS + 4, STEPS * 8)
    assert sum(state.data.counts.values()) == (STEPS + 4) * 8


@pytest.mark.parametrize(("engine", "extra"), [("fsdp", "selective"), ("zero3", "full")])
def test_every_engine_computes_a_document_mask_alike(whole: Path, engine: str, extra: str):
    wrapped = [f"engine={engine}", f"engine.activation_checkpointing={extra}", "run.stop_after_steps=4"]
    result = train(whole, f"run.name={engine}", *wrapped, world_size=2 if engine == "fsdp" else 1)
    assert result.code == 75, result.err
    ours, plain = metrics(whole / f"runs/{engine}"), metrics(whole / "runs/whole")[:4]
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in plain], rel=1e-5)
    assert [record["data_digest"] for record in ours] == [record["data_digest"] for record in plain]


def test_skipped_shards_are_counted_over_all_ranks(whole: Path):
    corpus = prepare(
        DataConfig(
            source=DataSource.jsonl,
            path=str(whole / "web.jsonl"),
            root=str(whole / "shards"),
            tokenizer="bytes",
            shard_tokens=900,
            prepare_processes=1,
        ),
        progress=False,
    )
    (corpus / "train-00001.bin").unlink()
    data = ["data=prepared", f"data.path={corpus}", "data.on_bad_shard=skip", "model.vocab_size=257", "train.steps=20"]
    small = [setting for setting in SMALL if not setting.startswith(("data=", "model.vocab_size", "train.steps"))]
    result = fork("train.py", *small, *data, "run.name=skips", cwd=whole, world_size=2)
    assert result.code == 0, result.err
    assert metrics(whole / "runs/skips")[-1]["data/skipped_shards"] == 1
    assert "data/skipped_shards" not in metrics(whole / "runs/whole")[-1]


def test_what_a_step_trained_on_can_be_read(whole: Path):
    result = fork("inspect_data.py", "directory=runs/killed", "step=7", "samples=8", cwd=whole)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == "step 7: samples 48 to 55 of the run"
    assert sum(" web " in line for line in lines) + sum(" code " in line for line in lines) >= 8
    opened = [line for line in lines if "(<|endoftext|>) w│e│b│ │" in line or "(<|endoftext|>) c│o│d│e│ │" in line]
    assert opened and all(line.startswith("   document ") for line in opened)
    assert fork("inspect_data.py", "directory=runs/killed", "step=0", cwd=whole).code == 2
