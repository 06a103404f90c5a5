"""A checkpoint is the state of the run: written under one engine and world size, it opens under any other."""

import functools
import hashlib
import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from bigtrain.checkpoint.dcp import CheckpointReader
from bigtrain.checkpoint.loader import load_checkpoint, verify_checkpoint
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import RunState, checkpoint_path
from bigtrain.config import CheckpointConfig, OptimizerKind, Verify
from bigtrain.data.order.cursor import Cursor
from bigtrain.distributed.collectives import all_reduce_sum
from bigtrain.engine import deepspeed_zero, native
from bigtrain.engine.state import whole_entry
from bigtrain.errors import CheckpointError
from bigtrain.optim.schedule import lr_at
from bigtrain.run.data import open_data, train_loader
from bigtrain.run.step import read_back, train_step
from bigtrain.tasks.causal_lm import CausalLM
from bigtrain.testing.ranks import RankFailedError, run_ranks
from tests.distributed.ranks import ENGINES, small_config, start_engine, with_engine
from tests.faults import saves

STEP = 3
LAST_STEP = STEP + 5
TRANSITIONS = [(2, 1), *(pytest.param(worlds, marks=pytest.mark.slow) for worlds in [(1, 2), (2, 4)])]
VARIANTS = (*ENGINES, "fsdp offload", "zero2 offload", "zero3 offload")


def variant_config(variant, world_size):
    engine, _, offload = variant.partition(" ")
    fields = {"offload": "cpu"} if offload else {}
    if engine == "hsdp":
        fields["dp_shard"] = min(world_size, 2)
    config = small_config()
    config.train.steps, config.train.micro_batch_size = LAST_STEP, 2
    return with_engine(config, engine, **fields)


@functools.cache
def stream():
    """The samples, which are the same for all engines; to open them makes a process group."""
    return open_data(variant_config("ddp", 1))["train"]


def run_steps(engine, config, first, last):
    pending = []
    start = Cursor(first, first * config.train.global_batch_size)
    with train_loader(stream(), config, engine, start=start) as loader:
        for batch in itertools.islice(loader, last - first):
            lr = lr_at(batch.step, peak_lr=config.optimizer.lr, num_steps=config.train.steps, config=config.scheduler)
            loss, norm = train_step(engine, batch, lr)
            pending.append({"loss": loss, "grad_norm": norm})
    return [record["loss"] for record in read_back(pending, CausalLM(), engine.mesh)]


def state_hashes(engine):
    """Hash of every whole tensor of the state, whatever the layout."""
    entries = engine.state.entries
    sizes = [math.prod(entry.shape) for entry in entries.values()]
    values = torch.zeros(sum(sizes), dtype=torch.float64)
    for entry, flat in zip(entries.values(), values.split(sizes), strict=True):
        whole = flat.view(entry.shape)
        for box in entry.own_boxes():
            whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.view.shape, strict=True))] = box.view.double()
    wholes = zip(entries, all_reduce_sum(values).split(sizes), strict=True)
    return {key: hashlib.sha256(whole.numpy().tobytes()).hexdigest() for key, whole in wholes}


def go_on(engine, config, root, first, last):
    """Go on from the checkpoint of step ``first``, if there is one, and save at ``last``; return hashes and losses."""
    if first:
        load_checkpoint(checkpoint_path(root, first), engine.state.entries)
        engine.state.commit()
    begun, losses = state_hashes(engine), run_steps(engine, config, first, last)
    saver = Saver(root, engine.state.entries, CheckpointConfig())
    saver.save(RunState(last, 0, 0, "synthetic", {}, {}, engine.mesh.size))
    saver.wait_until_staged()
    ended = state_hashes(engine)
    assert saver.finish().error is None
    return begun, ended, losses


def leg(config, root, first, last):
    return go_on(start_engine(config), config, root, first, last)


def save_under_all(world_size, root):
    """Train, save and train on under every engine; return state hashes at the save and losses after it."""
    results = {}
    for variant in VARIANTS:
        config = variant_config(variant, world_size)
        engine = start_engine(config)
        run_steps(engine, config, 0, STEP)
        saver = Saver(root / variant.replace(" ", "-"), engine.state.entries, CheckpointConfig())
        saver.save(RunState(STEP, 0, 0, "synthetic", {}, {}, world_size))
        saver.wait_until_staged()
        hashes = state_hashes(engine)
        losses = run_steps(engine, config, STEP, LAST_STEP)  # behind which the checkpoint is written
        report = saver.finish()
        assert report.error is None
        results[variant] = hashes, losses
    return results


def load_under_all(world_size, root):
    """Load every checkpoint below ``root`` under every engine, one after the other into the same engine."""
    results = {}
    paths = {source: checkpoint_path(root / source.replace(" ", "-"), STEP) for source in VARIANTS}
    assert [verify_checkpoint(path, Verify.full) for path in paths.values()] == [[]] * len(paths)
    for variant in VARIANTS:
        config = variant_config(variant, world_size)
        engine = start_engine(config)
        for source, path in paths.items():
            load_checkpoint(path, engine.state.entries)
            engine.state.commit()
            hashes = state_hashes(engine)
            results[source, variant] = hashes, run_steps(engine, config, STEP, LAST_STEP)
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """All checkpoints of a world size, made when first asked for."""
    made = {}

    def get(world_size):
        if world_size not in made:
            root = tmp_path_factory.mktemp(f"world{world_size}")
            made[world_size] = root, run_ranks(save_under_all, world_size, world_size, root, timeout_seconds=240)[0]
        return made[world_size]

    return get


@pytest.mark.parametrize("worlds", TRANSITIONS, ids=lambda w: f"{w[0]}to{w[1]}")
def test_every_engine_opens_what_any_engine_saved(saved, worlds):
    root, before = saved(worlds[0])
    after = run_ranks(load_under_all, worlds[1], worlds[1], root, timeout_seconds=280)[0]
    assert len(after) == len(VARIANTS) ** 2
    for (source, target), (hashes, losses) in after.items():
        expected_hashes, expected_losses = before[source]
        assert hashes == expected_hashes, f"{source} -> {target}: state differs"
        # Sums over another number of ranks are rounded differently: a few units of 6e-8.
        assert losses == pytest.approx(expected_losses, rel=1e-6), f"{source} -> {target}"


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023: an optimizer that no library of ours knows."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                p -= group["lr"] * (0.9 * momentum + 0.1 * p.grad).sign()
                momentum.mul_(0.99).add_(p.grad, alpha=0.01)


def optimizer_config(engine, kind):
    """A run with another optimizer, given to every engine in this process."""
    config = variant_config(engine, 2)
    if kind == "lion":
        config.optimizer.lr = 1e-4
        for module in (native, deepspeed_zero):
            module.build_optimizer = lambda groups, optimizer: Lion(groups, optimizer.lr)
    else:
        config.optimizer.kind = OptimizerKind[kind]
    return config


def save_with(kind, source, root):
    config = optimizer_config(source, kind)
    engine = start_engine(config)
    run_steps(engine, config, 0, STEP)
    saver = Saver(root, engine.state.entries, CheckpointConfig())
    saver.save(RunState(STEP, 0, 0, "synthetic", {}, {}, 2))
    assert saver.finish().error is None
    return state_hashes(engine), run_steps(engine, config, STEP, LAST_STEP)


def load_with(kind, target, root):
    engine = start_engine(config := optimizer_config(target, kind))
    load_checkpoint(checkpoint_path(root, STEP), engine.state.entries)
    engine.state.commit()
    return state_hashes(engine), run_steps(engine, config, STEP, LAST_STEP)


@pytest.mark.parametrize(
    ("kind", "source", "target"),
    [("sgd", "zero2", "fsdp"), ("lion", "zero2", "fsdp"), ("muon", "zero2", "fsdp"), ("muon", "fsdp", "zero3")],
)
def test_other_optimizers_go_the_same_way(kind, source, target, tmp_path):
    hashes, losses = run_ranks(save_with, 2, kind, source, tmp_path)[0]
    loaded_hashes, loaded_losses = run_ranks(load_with, 1, kind, target, tmp_path)[0]
    assert len([key for key in hashes if key.startswith("optim.")]) >= len(hashes) // 2
    assert loaded_hashes == hashes
    # The sign of Lion's update turns with a rounding where it is near 0.
    assert loaded_losses == pytest.approx(losses, rel=1e-4 if kind == "lion" else 1e-6)


def load(config, path, change=None):
    engine = start_engine(config)
    load_checkpoint(path, engine.state.entries)
    for key, entry in engine.state.entries.items():
        if change and key.endswith(change):
            for box in entry.boxes:
                box.view.zero_()
    engine.state.commit()
    return run_steps(engine, config, STEP, LAST_STEP)


def test_another_model_is_refused_with_the_differences(saved):
    root, _ = saved(1)
    config = small_config("ddp", model={"ffn_dim": 32})
    with pytest.raises(RankFailedError, match=r"belongs to another model(.|\n)*blocks.0.feed_forward.up"):
        run_ranks(load, 1, config, checkpoint_path(root / "ddp", STEP))


@pytest.mark.parametrize("lost", [".exp_avg", ".exp_avg_sq", ".step"])
def test_lost_optimizer_state_would_be_noticed(saved, lost):
    root, before = saved(1)
    losses = run_ranks(load, 1, variant_config("ddp", 1), checkpoint_path(root / "ddp", STEP), lost)[0]
    assert losses != pytest.approx(before["ddp"][1], rel=1e-4)


def load_with_dcp(path):
    """Fill FSDP2's parameters and optimizer state with torch's own tool; return the state's hashes before and after."""
    config = small_config("fsdp")
    engine = start_engine(config)
    names = dict(engine.module.network.named_parameters())
    before = state_hashes(engine)
    moments = {f"{name}.{key}": value for name, p in names.items() for key, value in engine.optimizer.state[p].items()}
    dcp.load({"model": names, "optim": {"state": moments}}, storage_reader=CheckpointReader(path))
    return before, state_hashes(engine)


def test_torchs_own_loader_opens_a_checkpoint(saved):
    root, expected = saved(1)
    before, after = run_ranks(load_with_dcp, 2, checkpoint_path(root / "zero2", STEP))[0]
    assert after == expected["zero2"][0]
    assert before != after


def test_torchs_own_loader_is_told_of_damage(saved, tmp_path):
    root, _ = saved(1)
    copy = Path(shutil.copytree(checkpoint_path(root / "ddp", STEP), tmp_path / f"step-{STEP:08d}"))
    file = next(copy.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(RankFailedError, match="its hash is"):
        run_ranks(load_with_dcp, 2, copy)


def _load_what_was_frozen_since(directory):
    saves.join()
    keys = [
        key.format(name) for name in ("a", "b") for key in ("model.{}", "optim.state.{}.exp_avg", "optim.state.{}.step")
    ]
    old = {key: whole_entry(torch.full((3,), float(i))) for i, key in enumerate(keys)}
    Saver(directory, old, CheckpointConfig(asynchronous=False)).save(saves.make_run_state(1))
    now = {key: whole_entry(torch.zeros(3)) for key in keys if not key.startswith("optim.state.b.")}
    load_checkpoint(checkpoint_path(directory, 1), now)
    assert all(torch.equal(entry.boxes[0].view, old[key].boxes[0].view) for key, entry in now.items())
    for lost in ("optim.state.a.step", "model.b"):
        rest = {key: entry for key, entry in now.items() if key != lost}
        with pytest.raises(CheckpointError, match=r"in the checkpoint, but not expected"):
            load_checkpoint(checkpoint_path(directory, 1), rest)


def test_optimizer_state_of_parameters_that_were_frozen_since_is_left_out(tmp_path):
    run_ranks(_load_what_was_frozen_since, 1, tmp_path, timeout_seconds=60)
