"""A run that ends by its metric: killed and continued elsewhere, it ends at the step of an undisturbed one."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from bigtrain.checkpoint.store import Standing, find_checkpoints, read_run_state, step_of
from bigtrain.config import ValidationConfig
from bigtrain.run.recovery import EARLY_STOPPING, explain_end, why_ended
from tests.distributed.launches import TRAIN, Launch, events, fork, metrics
from tests.faults import saves

ARGS = [
    *("+model=mlp_mnist", "model.settings.num_inputs=6", "model.settings.hidden_dims=[8]", "task=classification"),
    *("model.settings.num_outputs=4", "task.num_labels=4", "data=records", "data.path=table.npz"),
    *("data.validation_fraction=0.3", "train.steps=60", "train.global_batch_size=16", "train.log_every_steps=50"),
    *("optimizer.lr=3e-2", "scheduler.warmup_steps=1", "scheduler=constant", "checkpoint.every_steps=3"),
    *("checkpoint.keep=best", "validation.every_steps=2", "validation.metric=accuracy", "validation.patience=4"),
    *("engine.precision=fp32", "engine=ddp", "logging.layer_norms_every_steps=0"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A directory with a table of which little can be learnt, and the undisturbed run."""
    cwd = tmp_path_factory.mktemp("standing")
    random = np.random.default_rng(1)
    features = random.random((120, 6), dtype=np.float32)
    labels = np.where(random.random(120) < 0.5, (4 * features[:, 0]).astype(np.int64), random.integers(0, 4, 120))
    np.savez(cwd / "table.npz", features=features, labels=labels)
    done = fork("train.py", *ARGS, "run.name=whole", cwd=cwd)
    assert done.code == 0, done.err
    assert "no validation was better than accuracy " in done.out and "(validation.patience)" in done.out
    return cwd


def newest(run: Path):
    return read_run_state(find_checkpoints(run)[-1])


@pytest.mark.slow
def test_patience_counts_on_after_a_kill_and_a_resume_elsewhere(whole: Path):
    right = newest(whole / "runs/whole")
    accuracies = [event["accuracy"] for event in events(whole / "runs/whole", "validation")]
    assert right.step < 60 and right.standing.num_since == 4 and right.standing.best == max(accuracies)
    assert right.step == right.standing.best_step + 8 == 2 * len(accuracies)
    run = whole / "runs/parts"
    with Launch([sys.executable, TRAIN, *ARGS, "run.name=parts"], whole) as running:
        running.wait_until(lambda: find_checkpoints(run))
    given = [*ARGS, "run.name=parts", f"run.stop_after_steps={right.step - 1 - newest(run).step}"]
    stopped = fork("train.py", *given, "engine=fsdp", cwd=whole, world_size=2)
    assert stopped.code == 75 and newest(run).step == right.step - 1, stopped.err
    shutil.copytree(run, whole / "runs/forgetful")
    done = fork("train.py", *ARGS, "run.name=parts", cwd=whole, world_size=3)
    assert done.code == 0, done.err
    assert newest(run).standing == right.standing
    assert len(metrics(run)) == right.step and '"reason": "early_stopping"' in (run / "exit.json").read_text()

    # Without what the checkpoint says of the validations so far, it goes on for longer.
    saves.forge_run_state(find_checkpoints(whole / "runs/forgetful")[-1], lambda state: state.pop("standing"))
    later = fork("train.py", *ARGS, "run.name=forgetful", cwd=whole)
    assert later.code == 0 and newest(whole / "runs/forgetful").step > right.step, later.err


def test_the_best_checkpoint_is_kept_and_the_run_is_over_until_patience_grows(whole: Path):
    run = whole / "runs/whole"
    standing = newest(run).standing
    assert standing.best_step in map(step_of, find_checkpoints(run)) and standing.best_step < newest(run).step - 3
    again = fork("train.py", *ARGS, "run.name=whole", cwd=whole)
    assert again.code == 0 and "no validation was better than accuracy" in again.err + again.out
    assert len(metrics(run)) == newest(run).step
    more = fork("train.py", *ARGS, "run.name=whole", "validation.patience=5", cwd=whole)
    assert more.code == 0 and len(metrics(run)) == newest(run).step > standing.best_step + 8, more.err


def test_a_value_that_is_reached_ends_the_run_and_unknown_metrics_are_named(whole: Path):
    reached = fork("train.py", *ARGS, "run.name=reached", "validation.stop_at=0.3", cwd=whole)
    assert reached.code == 0, reached.err
    found = [event["accuracy"] for event in events(whole / "runs/reached", "validation")]
    assert found[-1] >= 0.3 > max([0, *found[:-1]]) and len(metrics(whole / "runs/reached")) == 2 * len(found) < 60
    assert "reached accuracy 0." in events(whole / "runs/reached", "finished")[0]["reason"]
    wrong = fork("train.py", *ARGS, "run.name=wrong", "validation.metric=acuracy", cwd=whole)
    assert wrong.code == 2 and "task=classification has loss, accuracy, precision, recall, f1, mcc" in wrong.err


def test_less_is_better_for_losses_and_nan_is_never_the_best():
    standing = Standing("loss", less_is_better=True)
    for step, value in enumerate([float("nan"), 3.0, 2.0, float("nan"), 2.0, 2.5], start=1):
        standing = standing.after(step, value)
    assert (standing.best, standing.best_step, standing.num_since) == (2.0, 3, 3)
    lost, limits = Standing("r2", less_is_better=False), ValidationConfig(every_steps=1, patience=2, stop_at=0.5)
    for step, ended in enumerate([None, EARLY_STOPPING], start=1):
        lost = lost.after(step, float("nan"))
        assert why_ended(lost, limits) == ended
    assert explain_end(lost, EARLY_STOPPING) == "r2 was no number in 2 validations (validation.patience)"
    assert Standing("f1", less_is_better=False).after(1, 0.5).after(2, 0.6).best_step == 2
