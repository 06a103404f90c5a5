"""Workers that average their weights now and then are the same run on any number of ranks that divides theirs."""

import dataclasses
import json

import numpy as np
import pytest

from bigtrain.config.check import check
from bigtrain.config.length import beyond_the_end
from bigtrain.config.sync import SyncConfig
from bigtrain.engine.local import LocalEngine
from bigtrain.run.step import train_step
from bigtrain.testing.parity import TOLERANCES, compare, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.checkpoint_test import leg, run_steps
from tests.distributed.launches import SMALL, events, fork, metrics
from tests.distributed.ranks import small_config, start_engine

DILOCO = {"outer_lr": 0.7, "outer_momentum": 0.9}


def local(world_size, **sync):
    """Return a run of 4 workers whose weights are averaged every third step."""
    config = small_config("ddp")
    config.train.micro_batch_size, config.train.global_batch_size, config.train.steps = 1, 8, 8
    config.logging.layer_norms_every_steps = 0
    config.sync = SyncConfig(**{"every_steps": 3, "workers": 4, **sync})
    assert check(config, world_size=world_size, local_world_size=world_size) == []
    return config


@pytest.fixture(scope="module")
def one_process():
    return {name: run_ranks(trace, 1, local(1, **sync), timeout_seconds=100)[0] for name, sync in VARIANTS.items()}


VARIANTS = {"average": {}, "diloco": DILOCO}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_run_is_that_of_one_process_with_all_workers(name, world_size, one_process):
    found = run_ranks(trace, world_size, local(world_size, **VARIANTS[name]), timeout_seconds=100)[0]
    difference = compare(found, one_process[name])
    print(name, world_size, difference)
    assert difference.within(TOLERANCES[local(1).engine.precision])


def forgetful(engine, batch, lr):
    """The mistake: a rank averages its own workers alone."""
    engine._synchronise = lambda: None
    return train_step(engine, batch, lr)


def test_workers_that_do_not_average_would_be_noticed(one_process):
    found = run_ranks(trace, 2, local(2), forgetful, timeout_seconds=100)[0]
    assert compare(found, one_process["average"]).loss > 1e-4


def averages(config):
    """Return, after some steps, what all agreed on and what the workers of this rank have, of one weight."""
    engine = start_engine(config)
    assert isinstance(engine, LocalEngine)
    run_steps(engine, config, 0, 2)
    name = "blocks.0.attention.out.weight"
    apart = engine.agreement.agreed[name].numpy().copy(), engine._stacked[name].detach().numpy().copy()
    run_steps(engine, config, 2, 3)
    return apart, (engine.agreement.agreed[name].numpy(), engine._stacked[name].detach().numpy())


def test_workers_part_between_averages_and_begin_again_from_their_mean():
    (agreed, workers), (mean, again) = run_ranks(averages, 1, local(1), timeout_seconds=100)[0]
    assert np.abs(workers - agreed).max() > 1e-4 and np.abs(workers[0] - workers[1]).max() > 1e-5
    assert all(np.array_equal(worker, mean) for worker in again)
    assert np.abs(mean - agreed).max() > 1e-4


def test_a_checkpoint_between_two_averages_goes_on_on_other_ranks(tmp_path):
    whole = run_ranks(leg, 1, local(1, **DILOCO), tmp_path / "whole", 0, 8, timeout_seconds=100)[0]
    before = None
    for first, last, world_size in ((0, 2, 2), (2, 5, 1), (5, 8, 4)):
        case = local(world_size, **DILOCO)
        begun, ended, losses = run_ranks(leg, world_size, case, tmp_path / "chain", first, last, timeout_seconds=100)[0]
        assert before in (None, begun), "what was loaded is not what was saved"
        assert losses == pytest.approx(whole[2][first:last], rel=1e-6)
        before = ended


def test_the_command_says_what_it_saved(tmp_path):
    settings = [*SMALL, "engine=ddp", "sync.every_steps=4", "sync.workers=2", "logging.layer_norms_every_steps=0"]
    ended = fork("train.py", *settings, "validation.every_steps=4", "run.name=x", cwd=tmp_path, world_size=2)
    assert ended.code == 0, ended
    last = metrics(tmp_path / "runs/x")[-1]
    assert last["perf/sync_bytes_saved"] == 3 * last["perf/sync_bytes"] > 0
    *_, validation = events(tmp_path / "runs/x", "validation")
    validated = fork("validate.py", "checkpoint=runs/x", "json=true", cwd=tmp_path, world_size=2)
    assert validated.code == 0, validated.err
    assert json.loads(validated.out)["loss"] == pytest.approx(validation["loss"], rel=1e-6)


def test_what_cannot_be_local_is_refused():
    config = local(2)
    for change, sentence in (
        (
            {"sync": SyncConfig(every_steps=3)},
            "sync.every_steps=3: say how many workers the run has, such as sync.workers=2",
        ),
        ({"sync": SyncConfig(every_steps=3, workers=3)}, "sync.workers=3: 2 ranks cannot have as many each"),
        ({"engine": small_config("fsdp").engine}, "engine=fsdp shards them; use engine=ddp"),
        ({"train": dataclasses.replace(config.train, global_batch_size=6)}, "use train.global_batch_size=8"),
    ):
        problems = "\n".join(check(dataclasses.replace(config, **change), world_size=2, local_world_size=2))
        assert sentence in problems, problems


@pytest.mark.parametrize(
    ("steps", "told"),
    [(6, []), (8, ["the last 2 of train.steps=8 are not"]), (2, ["none of train.steps=2 is averaged"])],
)
def test_steps_behind_the_last_average_are_told(steps, told):
    config = local(1)
    config.train.steps, config.scheduler.warmup_steps = steps, 0
    found = list(beyond_the_end(config))
    assert len(found) == len(told) and all(a in b for a, b in zip(told, found, strict=True)), found
