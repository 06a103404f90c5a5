"""Frozen weights: equal under every engine, never changed, left out of checkpoints and filled again from their origin."""

import dataclasses
import json
import shutil

import pytest
import torch

from bigtrain.checkpoint.manifest import read_manifest
from bigtrain.checkpoint.store import find_checkpoints, read_run_state
from bigtrain.config import EngineKind, Load, RunConfig
from bigtrain.distributed.collectives import shut_down
from bigtrain.errors import CheckpointError, ConfigError
from bigtrain.models import build_initial_values
from bigtrain.models.freeze import frozen_names
from bigtrain.plan.estimate import measure_model
from bigtrain.run import launching
from bigtrain.run.frozen import WeightReader
from bigtrain.testing.parity import Case, compare, compute, configure, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.ranks import small_config

FREEZE = ["embed_*", "blocks.0.*.weight"]
"""Tied embeddings, and matrices of a block whose biases are trained: a unit of FSDP has both."""
ENGINES = ("ddp", "fsdp", "zero2", "zero3")


def frozen_config(engine="ddp", root=None, freeze=FREEZE, **run):
    config = small_config(engine, model={"freeze": list(freeze)})
    config.checkpoint = dataclasses.replace(config.checkpoint, every_steps=3)
    return dataclasses.replace(config, run=RunConfig(name="run", root=str(root), **run)) if root else config


def trace_all(config):
    return [trace(configure(config, Case(EngineKind[engine], 2, 2))) for engine in ENGINES]


def test_engines_agree_and_frozen_weights_stay_as_they_began():
    config = frozen_config()
    reference = compute(config, Case(EngineKind.ddp, 1, 4))
    trained = compute(frozen_config(freeze=[]), Case(EngineKind.ddp, 1, 4))
    names = frozen_names(reference.parameters, config.model)
    assert 0 < len(names) < len(reference.parameters)
    assert compare(trained, reference).grad_norm > 1e-3, "the norm is of what is trained"
    values = build_initial_values(config.model, config.train.seed)
    for engine, found in zip(ENGINES, run_ranks(trace_all, 2, config, timeout_seconds=280)[0], strict=True):
        difference = compare(found, reference)
        print(engine, difference)
        assert max(difference.loss, difference.grad_norm) <= 1e-6, engine
        for name, weight in found.parameters.items():
            initial = torch.empty(weight.size)
            values[name].fill(0, initial)
            assert (torch.from_numpy(weight).flatten().equal(initial)) == (name in names), (engine, name)


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_checkpoint_without_them_continues_under_another_engine(tmp_path):
    whole = frozen_config("ddp", tmp_path / "whole")
    run_ranks(launching.run, 1, whole, timeout_seconds=120)
    stopped = frozen_config("ddp", tmp_path, stop_after_steps=3)
    run_ranks(launching.run, 1, stopped, timeout_seconds=120)
    (checkpoint,) = find_checkpoints(tmp_path / "run")
    keys = {tensor.key for tensor in read_manifest(checkpoint).tensors}
    names = read_run_state(checkpoint).frozen.names
    assert not any(name in key for name in names for key in keys) and "model.blocks.0.attention.out.bias" in keys
    for engine in ("zero3", "fsdp"):
        run_ranks(launching.run, 2, frozen_config(engine, tmp_path, stop_after_steps=1), timeout_seconds=200)
    run_ranks(launching.run, 1, frozen_config("ddp", tmp_path), timeout_seconds=120)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole/run"), rel=1e-6)
    read = WeightReader(find_checkpoints(tmp_path / "run")[-1])
    initial = torch.empty(read.read("model.embed_tokens.weight").numel())
    build_initial_values(whole.model, whole.train.seed)["embed_tokens.weight"].fill(0, initial)
    assert torch.equal(read.read("model.embed_tokens.weight").flatten(), initial)


def refusal(config):
    try:
        launching.run(config)
    except (CheckpointError, ConfigError) as error:
        shut_down()
        return str(error)
    return "not refused"


def refusals(root):
    """Return what is said of a run that began with another run's weights, when these have changed or are gone."""
    for seed in (0, 1):
        config = frozen_config("ddp", root / f"seed{seed}", freeze=[])
        config.train = dataclasses.replace(config.train, seed=seed, steps=3)
        launching.run(config)
    origin, other = (find_checkpoints(root / f"seed{seed}/run")[-1] for seed in (0, 1))
    config = frozen_config("ddp", root, stop_after_steps=3)
    config.checkpoint = dataclasses.replace(config.checkpoint, resume=str(origin), load=Load.weights)
    launching.run(config)
    config = frozen_config("ddp", root)
    said = [refusal(frozen_config("ddp", root, freeze=["embed_*"]))]
    shutil.rmtree(origin)
    said.append(refusal(config))
    shutil.copytree(other, origin)
    return [*said, refusal(config), refusal(frozen_config("ddp", root / "new", freeze=["no_such_*"]))]


def test_what_cannot_be_filled_again_is_refused(tmp_path):
    changed, gone, other, unknown = run_ranks(refusals, 1, tmp_path, timeout_seconds=200)[0]
    assert "blocks.0.attention" in changed and "was frozen in" in changed and "checkpoint.load=weights" in changed
    assert "frozen weights, which came from" in gone and gone.endswith("that is gone")
    assert "has others by now" in other
    assert "'no_such_*' matches no parameter" in unknown and "embed_tokens.weight" in unknown


def test_the_preflight_counts_them_without_gradient_and_optimizer():
    config = frozen_config()
    sizes, _ = measure_model(config.model)
    all_trained, _ = measure_model(dataclasses.replace(config.model, freeze=[]))
    assert sizes.total == all_trained.total == all_trained.trained and 0 < sizes.trained < sizes.total
    with pytest.raises(ConfigError, match="all parameters are frozen"):
        frozen_names(["a.weight", "b.weight"], dataclasses.replace(config.model, freeze=["*"]))
