"""A run on records: killed, and continued on other ranks under another engine, it is the run of one process."""

import sys
from pathlib import Path

import pytest

from tests.distributed.launches import TRAIN, Launch, events, fork, metrics, num_steps

STEPS = 12
IDEAS = '''
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bigtrain.tasks.base import Field, Objective


@dataclass(frozen=True)
class net:
    width: int = 8

    def build(self):
        return nn.Sequential(nn.Flatten(), nn.Linear(12, self.width), nn.GELU(), nn.Linear(self.width, 4))


class labels(Objective):
    fields = {"pixels": Field(torch.float32, (3, "H", "W")), "label": Field(torch.int64, (), ignored=-100)}
    sums = {"hits": (4,), "rows": (4,)}

    def count(self, samples):
        return (samples["label"] != -100).astype(np.int64)

    def __call__(self, network, pixels, label):
        logits, counts = network(pixels), label != -100
        loss = F.cross_entropy(logits, label, ignore_index=-100, reduction="sum")
        of_class = F.one_hot(label.clamp(min=0), 4) * counts[:, None]
        hits = of_class * (logits.argmax(-1) == label)[:, None]
        return torch.cat([loss[None], hits.sum(0), of_class.sum(0)])

    def metrics(self, loss, sums):
        recall = sums["hits"] / np.maximum(sums["rows"], 1)
        return {"accuracy": float(sums["hits"].sum() / sums["rows"].sum()), "recall": float(recall.mean())}


@dataclass
class stars:
    """Rows that are turned by a number of quarters that depends on their position in the run."""

    num_stars: int = 41
    first: int = 0

    def __len__(self):
        return self.num_stars

    def __getitem__(self, row):
        pixels = np.random.default_rng(self.first + row).normal(size=(3, 2, 2)) + row % 4
        return {"pixels": pixels, "label": row % 4}

    def gather(self, rows, positions):
        found = [self[row] for row in rows.tolist()]
        turns = [np.random.default_rng((5, position)).integers(4) for position in positions.tolist()]
        turned = [np.rot90(row["pixels"], n, (1, 2)) for row, n in zip(found, turns, strict=True)]
        return {"pixels": np.stack(turned), "label": [row["label"] for row in found]}
'''
ARGS = [
    "--import=./ideas.py",
    "+model=ideas.net",
    "task=ideas.labels",
    "data=ideas.stars",
    f"train.steps={STEPS}",
    "train.global_batch_size=7",
    "train.micro_batch_size=2",
    "train.log_every_steps=1",
    "optimizer.lr=1e-2",
    "scheduler.warmup_steps=1",
    "checkpoint.every_steps=2",
    "validation.every_steps=6",
    "validation.batches=2",
    "data.validation_fraction=0.2",
    "engine.precision=fp32",
    "logging.layer_norms_every_steps=0",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the file of ideas and an uninterrupted run of one process."""
    cwd = tmp_path_factory.mktemp("records")
    (cwd / "ideas.py").write_text(IDEAS)
    result = fork("train.py", *ARGS, "engine=ddp", "run.name=whole", cwd=cwd)
    assert result.code == 0, result.err
    assert (
        "step        7 samples = 2 x " in result.out and " samples/s" in result.out and "perplexity" not in result.out
    )
    return cwd


def require_same(run: Path, other: Path) -> None:
    ours, theirs = metrics(run), metrics(other)
    assert len(ours) == len(theirs) == STEPS
    for key in ("data_digest", "samples"):
        assert [record[key] for record in ours] == [record[key] for record in theirs], key
    for key in ("loss", "train/accuracy", "train/recall"):
        expected = pytest.approx([record[key] for record in theirs], rel=1e-6)
        assert [record[key] for record in ours] == expected, key
    found, wanted = ([event["loss"] for event in events(path, "validation")] for path in (run, other))
    assert len(found) == 2 and found == pytest.approx(wanted, rel=1e-6)
    assert "tokens" not in ours[-1] and ours[-1]["samples"] == STEPS * 7
    assert {"samples_per_second", "data/samples/data", "data/epochs/data"} <= ours[-1].keys()


def test_a_killed_run_goes_on_as_the_run_of_one_process(whole: Path):
    run = whole / "runs/killed"
    command = [sys.executable, TRAIN, *ARGS, "engine=ddp", "run.name=killed"]
    with Launch(command, whole) as running:
        running.wait_until(lambda: num_steps(run) >= 5)
    assert num_steps(run) < STEPS
    stopped = fork(
        "train.py", *ARGS, "engine=fsdp", "run.name=killed", "run.stop_after_steps=4", cwd=whole, world_size=2
    )
    assert stopped.code == 75, stopped.err
    done = fork("train.py", *ARGS, "engine=ddp", "run.name=killed", cwd=whole, world_size=3)
    assert done.code == 0, done.err
    assert [event["world_size"] for event in events(run, "resume")] == [2, 3]
    require_same(run, whole / "runs/whole")


def test_fsdp_on_three_ranks_is_the_run_of_one_process_and_is_shown(whole: Path):
    done = fork("train.py", *ARGS, "engine=fsdp", "run.name=three", cwd=whole, world_size=3)
    assert done.code == 0, done.err
    require_same(whole / "runs/three", whole / "runs/whole")
    shown = fork("inspect_data.py", "--import=./ideas.py", "directory=runs/three", "step=3", "samples=2", cwd=whole)
    assert shown.code == 0 and "step 3: samples 14 to 20" in shown.out, shown.err
    assert shown.out.count("   pixels: [[[") == shown.out.count("   label: ") == shown.out.count(", row ") == 2
    changed = fork("train.py", *ARGS, "data.settings.first=1", "run.name=three", f"train.steps={STEPS + 1}", cwd=whole)
    assert changed.code == 2 and "was trained on other data" in changed.err, changed.err
