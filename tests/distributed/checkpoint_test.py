"""A checkpoint is the state of the run: written under one engine and world size, it opens under any other."""

import hashlib
import itertools

import pytest
import torch

from bigtrain.checkpoint.store import RunState, load_checkpoint, save_checkpoint
from bigtrain.data import open_splits
from bigtrain.distributed import all_reduce_sum, shut_down
from bigtrain.local_ranks import RankFailedError, run_ranks
from bigtrain.optim.schedule import lr_at
from bigtrain.trainer import read_back, train_loader, train_step
from tests.distributed.ranks import ENGINES, small_config, start_engine, with_engine


def run_steps(engine, config, first, last):
    pending = []
    splits = open_splits(config.data, vocab_size=config.model.vocab_size)
    with train_loader(splits["train"], config, engine, first_step=first) as loader:
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


def run_state(config, step):
    return RunState(step, 0, 0, "synthetic", {}, {}, 0)


def train_save_train(config, directory):
    engine = start_engine(config)
    run_steps(engine, config, 0, 3)
    save_checkpoint(directory, engine.state.entries, run_state(config, 3))
    hashes = state_hashes(engine)
    losses = run_steps(engine, config, 3, 6)
    shut_down()
    return hashes, losses


def load_train(config, path):
    engine = start_engine(config)
    load_checkpoint(path, engine.state.entries)
    engine.state.commit()
    hashes = state_hashes(engine)
    losses = run_steps(engine, config, 3, 6)
    shut_down()
    return hashes, losses


def load(config, path):
    engine = start_engine(config)
    load_checkpoint(path, engine.state.entries)


def settings(engine, world_size):
    return {"dp_shard": 2 if world_size > 1 else 1} if engine == "hsdp" else {}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One checkpoint per engine and world size, made when first asked for."""
    made = {}

    def get(engine, world_size):
        if (engine, world_size) not in made:
            directory = tmp_path_factory.mktemp(f"{engine}{world_size}")
            config = small_config(engine, **settings(engine, world_size))
            made[engine, world_size] = directory, run_ranks(train_save_train, world_size, config, directory)[0]
        return made[engine, world_size]

    return get


@pytest.mark.parametrize("worlds", [(2, 1), (1, 2), (2, 4)], ids=lambda w: f"{w[0]}to{w[1]}")
@pytest.mark.parametrize("source", ENGINES)
def test_every_engine_opens_what_any_engine_saved(saved, source, worlds):
    directory, (hashes, losses) = saved(source, worlds[0])
    for target in ENGINES:
        config = with_engine(small_config(), target, **settings(target, worlds[1]))
        loaded_hashes, loaded_losses = run_ranks(
            load_train, worlds[1], config, directory / "checkpoints/step-00000003"
        )[0]
        assert loaded_hashes == hashes, f"{source} -> {target}: state differs"
        # Sums over another number of ranks are rounded differently: a few units of 6e-8.
        assert loaded_losses == pytest.approx(losses, rel=1e-6), f"{source} -> {target}"


def test_another_model_is_refused_with_the_differences(saved):
    directory, _ = saved("ddp", 1)
    config = small_config("ddp", model={"ffn_dim": 32})
    with pytest.raises(
        RankFailedError, match=r"CheckpointError.*belongs to another model(.|\n)*blocks.0.feed_forward.up"
    ):
        run_ranks(load, 1, config, directory / "checkpoints/step-00000003")


def test_a_missing_optimizer_state_would_be_noticed(saved):
    directory, (_, losses) = saved("ddp", 1)
    config = small_config("ddp")
    config.optimizer.betas = [0.0, 0.0]  # other moments after the next step: the losses must differ
    _, other = run_ranks(load_train, 1, config, directory / "checkpoints/step-00000003")[0]
    assert other != pytest.approx(losses, rel=1e-6)
