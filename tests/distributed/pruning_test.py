"""A pruned model is trained on with its zeros: the same run under every engine, through changes of it, and as an export."""

import dataclasses
import re
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from bigtrain.checkpoint.store import find_checkpoints
from bigtrain.config import EngineKind, OptimizerKind
from bigtrain.engine.state import MODEL, fill_weights
from bigtrain.models import build_initial_values, build_model
from bigtrain.models.init import Whole
from bigtrain.models.pruning import prunable, without_smallest
from bigtrain.run.frozen import WeightReader
from bigtrain.run.step import train_step
from bigtrain.testing.parity import Case, compare, configure, trace
from bigtrain.testing.ranks import run_ranks
from tests.distributed.launches import fork, metrics
from tests.distributed.quantise_test import SETTINGS
from tests.distributed.ranks import small_config

KINDS = {2: ["ddp", "fsdp", "zero2", "zero3"], 4: ["ddp", "fsdp", "zero2"]}


def config(**changes):
    config = small_config()
    config.train.steps = 4
    config.optimizer = dataclasses.replace(config.optimizer, keep_zeros=True, eps=1e-4, **changes)
    return config


def pruned_values(config):
    """Return the initial values of the matrices of the blocks, half of each 0."""
    with torch.device("meta"):
        network = build_model(config.model)
    initial = build_initial_values(config.model, config.train.seed)

    def read(name):
        whole = torch.empty(network.get_parameter(name).shape)
        initial[name].fill(0, whole.view(-1))
        return without_smallest(whole, 0.5)

    return {name: Whole(partial(read, name)) for name in prunable(network, [])}


def step(engine, batch, lr, *, config):
    if batch.step == 0:
        values = pruned_values(config)
        fill_weights({MODEL + name: engine.state.entries[MODEL + name] for name in values}, values)
        engine.state.commit()
    return train_step(engine, batch, lr)


def trace_all(configs):
    return [trace(config, partial(step, config=config)) for config in configs]


RULES = (config(), config(kind=OptimizerKind.muon), config(kind=OptimizerKind.sgd, lr=0.1))


@pytest.fixture(scope="module")
def alone():
    """What one process computes with each rule, and without keeping zeros."""
    lost = dataclasses.replace(config(), optimizer=dataclasses.replace(config().optimizer, keep_zeros=False))
    return run_ranks(trace_all, 1, [*RULES, lost], timeout_seconds=200)[0]


def zeros_kept(trajectory):
    masks = {name: value.read() == 0 for name, value in pruned_values(config()).items()}
    assert len(masks) == 8
    return all(torch.equal(torch.from_numpy(trajectory.parameters[name]) == 0, mask) for name, mask in masks.items())


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_engines_keep_the_same_zeros_at_every_world_size(world_size, alone):
    *expected, without = alone
    assert all(map(zeros_kept, expected)) and not zeros_kept(without)
    cases = [(kind, rule) for kind in KINDS[world_size] for rule in range(len(RULES) if world_size == 2 else 1)]
    configs = [configure(RULES[rule], Case(EngineKind[kind], world_size, 2)) for kind, rule in cases]
    results = run_ranks(trace_all, world_size, configs, timeout_seconds=280)[0]
    for (kind, rule), found in zip(cases, results, strict=True):
        difference = compare(found, expected[rule])
        print(world_size, kind, RULES[rule].optimizer.kind.name, difference)
        assert max(difference.loss, difference.grad_norm) <= 1e-5 and zeros_kept(found), (kind, rule)


def zeros_of(run):
    reader = WeightReader(find_checkpoints(run)[-1])
    matrices = [key for key in reader.records if re.fullmatch(r"model\.blocks\.\d\.\w+\.\w+\.weight", key)]
    return {key: reader.read(key) == 0 for key in matrices}


def test_a_run_is_pruned_and_trained_on_by_other_engines_and_exported(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"{n} sheep jump over {n % 7} fences" * 4 for n in range(90)))

    def call(script, *settings, code=0, world_size=1):
        done = fork(script, *settings, cwd=tmp_path, world_size=world_size)
        assert done.code == code and "Traceback" not in done.err, done.err
        return done

    call("train.py", *SETTINGS, "run.name=dense")
    pytest.importorskip("matplotlib")
    curve = call("prune.py", "run=runs/dense", "sparsity=[0.9,0.5]", "out=curve.svg").out.splitlines()
    assert [line.split()[0] for line in curve[:4]] == ["sparsity", "0.0", "0.5", "0.9"]
    assert (tmp_path / "curve.svg").read_text().count("<svg") == 1
    done = call("prune.py", "run=runs/dense", "sparsity=0.5", "out=runs/half", world_size=2)
    pruned = zeros_of(tmp_path / "runs/half")
    assert all(mask.float().mean() == pytest.approx(0.5, abs=0.01) for mask in pruned.values())
    assert any(line == curve[2] for line in done.out.splitlines()), "two ranks prune as one does"
    loss = call("validate.py", "checkpoint=runs/half").out
    assert f"{float(curve[2].split()[2]):.4f}" in loss

    tuned = [*SETTINGS, "checkpoint.resume=runs/half", "checkpoint.load=weights", "optimizer.eps=1e-4"]
    kept = [*tuned, "optimizer.keep_zeros=true"]
    call("train.py", *kept, "run.name=whole")
    for engine, more, code in (("fsdp", ["run.stop_after_steps=2"], 75), ("zero2", ["run.stop_after_steps=2"], 75)):
        call("train.py", *kept, "run.name=changed", f"engine={engine}", *more, code=code, world_size=2)
    call("train.py", *kept, "run.name=changed", "engine=ddp")
    losses = [[step["loss"] for step in metrics(tmp_path / "runs" / name)] for name in ("whole", "changed")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name in ("whole", "changed"):
        assert all(torch.equal(mask, pruned[key]) for key, mask in zeros_of(tmp_path / "runs" / name).items())
    call("train.py", *tuned, "run.name=lost")
    assert not any(torch.equal(mask, pruned[key]) for key, mask in zeros_of(tmp_path / "runs/lost").items())

    call("export.py", "checkpoint=runs/changed", "out=exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").state_dict()
    matrices = [weight for name, weight in exported.items() if ".layers." in name and weight.ndim == 2]
    share = sum(int((weight == 0).sum()) for weight in matrices) / sum(weight.numel() for weight in matrices)
    assert share == pytest.approx(0.5, abs=0.01)

    call("prune.py", "run=runs/dense", "pattern=2:4", "out=fours")
    assert all(((mask.unflatten(1, (-1, 4)).sum(dim=-1) >= 2).all()) for mask in zeros_of(tmp_path / "fours").values())
    for arguments, told in {
        ("run=runs/dense", "sparsity=0.5", "out=runs/half"): "out=runs/half exists",
        ("run=runs/dense", "out=other"): "how much? sparsity=0.5",
        ("run=runs/dense", "sparsity=0.5"): "out: missing",
        ("run=runs/dense", "sparsity=1.5", "out=other"): "must be less than 1",
    }.items():
        assert told in call("prune.py", *arguments, code=2).err
    assert (
        "no matrix has a zero to keep"
        in call("train.py", *SETTINGS, "run.name=new", "optimizer.keep_zeros=true", code=2).err
    )
