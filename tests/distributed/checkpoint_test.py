"""A checkpoint is the state of the run: written under one engine and world size, it opens under any other."""

import hashlib
import itertools

import pytest
import torch

from bigtrain.checkpoint.loader import load_checkpoint, verify_checkpoint
from bigtrain.checkpoint.saver import Saver
from bigtrain.checkpoint.store import RunState, checkpoint_path
from bigtrain.config import CheckpointConfig, Verify
from bigtrain.data.state import Cursor
from bigtrain.distributed import all_reduce_sum
from bigtrain.local_ranks import RankFailedError, run_ranks
from bigtrain.optim.schedule import lr_at
from bigtrain.trainer import open_data, read_back, train_loader, train_step
from tests.distributed.ranks import ENGINES, small_config, start_engine, with_engine

STEP = 3
TRANSITIONS = [(2, 1), (1, 2), (2, 4)]
VARIANTS = (*ENGINES, "fsdp offload", "zero2 offload", "zero3 offload")


def variant_config(variant, world_size):
    engine, _, offload = variant.partition(" ")
    fields = {"offload": "cpu"} if offload else {}
    if engine == "hsdp":
        fields["dp_shard"] = min(world_size, 2)
    return with_engine(small_config(), engine, **fields)


def run_steps(engine, config, first, last):
    pending = []
    start = Cursor.at(first, config.train.global_batch_size)
    with train_loader(open_data(config)["train"], config, engine, start=start) as loader:
        for batch in itertools.islice(loader, last - first):
            lr = lr_at(batch.step, peak_lr=config.optimizer.lr, num_steps=config.train.steps, config=config.scheduler)
            loss, norm = train_step(engine, batch, lr)
            pending.append({"loss": loss, "grad_norm": norm})
    return [record["loss"] for record in read_back(pending)]


def state_hashes(engine):
    """Hash of every whole tensor of the state, whatever the layout."""
    hashes = {}
    for key, entry in engine.state.entries.items():
        whole = torch.zeros(entry.shape, dtype=torch.float64)
        for box in entry.own_boxes():
            whole[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.view.shape, strict=True))] = box.view.double()
        hashes[key] = hashlib.sha256(all_reduce_sum(whole).numpy().tobytes()).hexdigest()
    return hashes


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
        losses = run_steps(engine, config, STEP, 2 * STEP)  # behind which the checkpoint is written
        report = saver.finish()
        assert report.error is None
        results[variant] = hashes, losses
    return results


def load_under_all(world_size, root):
    """Load every checkpoint below ``root`` under every engine, one after the other into the same engine."""
    results = {}
    for variant in VARIANTS:
        config = variant_config(variant, world_size)
        engine = start_engine(config)
        for source in VARIANTS:
            path = checkpoint_path(root / source.replace(" ", "-"), STEP)
            assert verify_checkpoint(path, Verify.full) == []
            load_checkpoint(path, engine.state.entries)
            engine.state.commit()
            hashes = state_hashes(engine)
            results[source, variant] = hashes, run_steps(engine, config, STEP, 2 * STEP)
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


def load(config, path, change=None):
    engine = start_engine(config)
    load_checkpoint(path, engine.state.entries)
    for key, entry in engine.state.entries.items():
        if change and key.endswith(change):
            for box in entry.boxes:
                box.view.zero_()
    engine.state.commit()
    return run_steps(engine, config, STEP, 2 * STEP)


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
