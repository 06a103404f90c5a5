"""How matrices are cut among ranks, by integers alone: every element is somewhere once, and boxes say where."""

import math

import pytest
import torch

from bigtrain.config import ModelConfig, TrainConfig
from bigtrain.config.check import resolve
from bigtrain.engine.state import Box, Entry, fill_box, flat_boxes, in_whole
from bigtrain.models import build_initial_values
from bigtrain.models.exchange import Exchange
from bigtrain.models.partition import cut, cuts, share
from bigtrain.models.transformer import Transformer

GPT = {"num_layers": 1, "hidden_dim": 12, "num_heads": 4, "vocab_size": 11, "ffn_dim": 7}
LLAMA = GPT | {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "head_dim": 6}
LLAMA |= {"bias": False, "tie_embeddings": False}


class Place(Exchange):
    def __init__(self, size, rank):
        self.size, self.rank = size, rank


def model_of(shape):
    config = resolve(TrainConfig(model=ModelConfig(**shape))).model
    with torch.device("meta"):
        return Transformer(config), config


def local(model, name):
    """Return this rank's memory of a parameter, numbered."""
    shape = model.get_parameter(name).shape
    return torch.arange(1.0, 1 + shape.numel()).view(shape)


def test_shares_differ_by_one_at_most_and_follow_each_other():
    for number in range(20):
        for size in range(1, 6):
            parts = [share(number, size, rank) for rank in range(size)]
            assert [i for part in parts for i in part] == list(range(number))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            assert max(map(len, parts)) == -(-number // size)


@pytest.mark.parametrize(("shape", "sizes"), [(GPT, (1, 2, 4)), (LLAMA, (1, 2))])
@pytest.mark.parametrize("num_shards", [1, 2, 3])
@pytest.mark.parametrize("layout", ["rows", "flat"])
def test_every_element_is_held_once(shape, sizes, num_shards, layout):
    whole, _ = model_of(shape)
    for size in sizes:
        counts = {name: torch.zeros(p.shape) for name, p in whole.named_parameters()}
        for rank in range(size):
            model, _ = model_of(shape)
            cut(model, Place(size, rank))
            for name, parameter in model.named_parameters():
                memory = torch.zeros(parameter.shape)
                for shard in range(num_shards):
                    for box in boxes(memory, shard, num_shards, layout, model.cuts.get(name), rank, size):
                        counts[name][
                            tuple(slice(o, o + n) for o, n in zip(box.offsets, box.view.shape, strict=True))
                        ] += 1
        for name, count in counts.items():
            assert count.unique().tolist() == [1 if name in cuts(whole, size, 0) else size], (name, size)


def boxes(memory, shard, num_shards, layout, part, rank, size):
    """Return what a data-parallel rank has of a rank's part: some rows, as FSDP2 cuts, or a flat range, as ZeRO does."""
    shape = tuple(memory.shape)
    if layout == "rows":
        rows = memory.chunk(num_shards)
        if shard >= len(rows):
            return ()
        found = (Box((sum(map(len, rows[:shard])), *(0 for _ in shape[1:])), rows[shard]),)
    else:
        mine = share(memory.numel(), num_shards, shard)
        found = flat_boxes(shape, mine.start, memory.view(-1)[mine.start : mine.stop])
    return in_whole(Entry(shape, memory.dtype, found), part, rank=rank, size=size).boxes


@pytest.mark.parametrize("shape", [GPT, LLAMA])
def test_parts_begin_with_the_values_of_the_whole(shape):
    whole, config = model_of(shape)
    values = build_initial_values(config, seed=3)
    expected = {}
    for name, parameter in whole.named_parameters():
        expected[name] = torch.empty(parameter.shape)
        fill_box(values[name], tuple(parameter.shape), (0,) * parameter.ndim, expected[name])
    for rank in range(2):
        model, _ = model_of(shape)
        cut(model, Place(2, rank))
        for name, parameter in model.named_parameters():
            entry = Entry(
                tuple(parameter.shape), torch.float32, (Box((0,) * parameter.ndim, torch.empty(parameter.shape)),)
            )
            entry = in_whole(entry, model.cuts.get(name), rank=rank, size=2)
            assert entry.shape == tuple(expected[name].shape)
            for box in entry.boxes:
                fill_box(values[name], entry.shape, box.offsets, box.view)
                where = tuple(slice(o, o + n) for o, n in zip(box.offsets, box.view.shape, strict=True))
                assert torch.equal(box.view, expected[name][where]), name


def test_what_is_whole_on_all_ranks_is_a_replica_there():
    entry = Entry((3,), torch.float32, (Box((0,), torch.zeros(3)),), replica=1, num_replicas=2)
    found = in_whole(entry, None, rank=2, size=4)
    assert (found.replica, found.num_replicas) == (6, 8)
    assert found.boxes == entry.boxes


def test_a_tied_head_is_cut_once_and_the_rows_of_q_k_and_v_in_three_runs():
    model, _ = model_of(GPT)
    found = cuts(model, 2, 1)
    assert "output.weight" not in found
    assert found["embed_tokens.weight"].runs == (range(5, 11),)
    assert found["blocks.0.attention.qkv.bias"].runs == (range(6, 12), range(18, 24), range(30, 36))
    assert found["blocks.0.attention.out.weight"].runs == (range(6, 12),)
    assert found["blocks.0.feed_forward.down.weight"].dim == 1
    assert {name.rpartition(".")[0] for name in found} == {
        "embed_tokens",
        *(f"blocks.0.{layer}" for layer in ("attention.qkv", "attention.out", "feed_forward.up", "feed_forward.down")),
    }
    assert math.prod(found["embed_tokens.weight"].whole((6, 12))) == 11 * 12
