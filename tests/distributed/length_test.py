"""The length of a run in epochs or tokens: as many steps as the data says, once, and more when it goes on."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from bigtrain.cli.hydra_cli import read_run
from bigtrain.config import TrainingConfig
from bigtrain.config.length import steps_to_train
from bigtrain.errors import ConfigError
from tests.distributed.launches import SMALL, fork, metrics, trajectory

TABLE = [
    *("+model=mlp_mnist", "model.settings.num_inputs=6", "model.settings.hidden_dims=[8]", "data=records"),
    *("model.settings.num_outputs=4", "task=classification", "task.num_labels=4", "data.path=table.npz"),
    *("data.validation_fraction=0", "train.global_batch_size=16", "scheduler.warmup_steps=1", "optimizer.lr=3e-2"),
    *("engine.precision=fp32", "engine=ddp", "logging.layer_norms_every_steps=0", "checkpoint.every_steps=5"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a table of 100 rows."""
    place = tmp_path_factory.mktemp("length")
    features = np.random.default_rng(1).random((100, 6), dtype=np.float32)
    np.savez(place / "table.npz", features=features, labels=(4 * features[:, 0]).astype(np.int64))
    return place


def test_epochs_are_as_many_steps_and_a_run_goes_on_with_more(place: Path):
    run = place / "runs/epochs"
    done = fork("train.py", *TABLE, "train.epochs=2", "run.name=epochs", cwd=place)
    assert done.code == 0 and "2 epochs of 100 samples are 13 steps" in done.out + done.err, done.err
    same = fork("train.py", *TABLE, "train.steps=13", "run.name=steps", cwd=place)
    assert same.code == 0 and trajectory(run) == trajectory(place / "runs/steps") and len(metrics(run)) == 13
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"] == 13
    again = fork("train.py", *TABLE, "train.epochs=2", "run.name=epochs", cwd=place)
    assert again.code == 0 and "is finished at step 13; a larger train.epochs trains on" in again.out + again.err
    assert "2 epochs of 100 samples are done, at step 13" in again.out + again.err and len(metrics(run)) == 13
    more = fork("train.py", *TABLE, "train.epochs=2.5", "run.name=epochs", cwd=place, world_size=2)
    assert more.code == 0 and len(metrics(run)) == 16 and "train.epochs: 2.0 -> 2.5" in more.out, more.err


def test_tokens_are_as_many_steps_of_text(place: Path):
    args = [arg for arg in SMALL if not arg.startswith("train.steps")]
    done = fork("train.py", *args, "train.tokens=300", "engine=ddp", "run.name=tokens", cwd=place)
    assert done.code == 0, done.err
    assert metrics(place / "runs/tokens")[-1]["tokens"] == 384 == 3 * 8 * 16
    wrong = fork("train.py", *TABLE, "train.tokens=300", "run.name=none", cwd=place)
    assert wrong.code == 2 and "these samples are no sequences of tokens" in wrong.err


def test_exactly_one_length_counts():
    with pytest.raises(ConfigError, match=r"train.steps and train.epochs: one of them says how long"):
        read_run([*SMALL, "train.epochs=3"])
    with pytest.raises(ConfigError, match=r"of which component of data.mixture"):
        read_run([*TABLE, "data.mixture.a.weight=1", "train.epochs=3"])
    assert read_run([*SMALL[:-1], "train.steps=5"]).train.is_open is False


def test_another_batch_size_trains_on_the_rest_of_the_samples():
    train = TrainingConfig(epochs=3, global_batch_size=10)
    sizes = {"num_samples": 100, "sequence_length": None}
    assert steps_to_train(train, **sizes, step=0, samples=0) == 30
    assert steps_to_train(train, **sizes, step=10, samples=100) == 30
    assert steps_to_train(train, **sizes, step=5, samples=100) == 25
    assert steps_to_train(train, **sizes, step=50, samples=500) == 50
