"""Boxes: a flat range of a tensor as views, whole, disjoint and in place."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bigtrain.engine import state
from bigtrain.engine.state import Box, Entry, create_optimizer_state, fill_box, flat_boxes
from bigtrain.models.init import Normal

shapes = st.lists(st.integers(1, 5), min_size=0, max_size=4).map(tuple)


def region(box: Box) -> tuple[slice, ...]:
    return tuple(slice(o, o + n) for o, n in zip(box.offsets, box.view.shape, strict=True))


@given(shapes, st.data())
def test_boxes_of_a_flat_range_cover_exactly_that_range(shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    whole = torch.arange(numel, dtype=torch.float32).reshape(shape)
    flat = whole.reshape(-1)[start:stop].clone()

    boxes = flat_boxes(shape, start, flat)

    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    rebuilt = torch.full(shape, -1.0)
    for box in boxes:
        assert torch.equal(box.view, whole[region(box)])
        rebuilt[region(box)] = box.view
    assert int((rebuilt >= 0).sum()) == stop - start


@given(shapes, st.integers(1, 30), st.data())
def test_initial_values_fill_any_box(shape, chunk, data):
    sizes = [sorted(data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)))) for n in shape]
    offsets, ends = tuple(low for low, _ in sizes), [max(high, low + 1) for low, high in sizes]
    value, whole = Normal(1.0, 7, "weight"), torch.empty(shape)
    value.fill(0, whole.view(-1))
    memory = torch.full(shape, math.nan)
    inside = tuple(slice(low, high) for low, high in zip(offsets, ends, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "_CHUNK_ELEMENTS", chunk)
        fill_box(value, shape, offsets, memory[inside])
    assert torch.equal(memory[inside], whole[inside])
    assert memory.isfinite().sum() == whole[inside].numel(), "and nothing else"


def test_boxes_are_views_of_the_memory():
    flat = torch.zeros(7)
    for box in flat_boxes((3, 4), 2, flat):
        box.view.fill_(1.0)
    assert torch.equal(flat, torch.ones(7))


@given(shapes, st.integers(1, 7))
def test_replicas_share_a_box_without_gap_or_overlap(shape, num_replicas):
    tensor = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    counts = torch.zeros(shape)
    for replica in range(num_replicas):
        entry = Entry(shape, tensor.dtype, (Box((0,) * len(shape), tensor),), replica, num_replicas)
        for box in entry.own_boxes():
            assert torch.equal(box.view, tensor[region(box)])
            counts[region(box)] += 1
    assert torch.equal(counts, torch.ones(shape))


@pytest.mark.parametrize("build", [torch.optim.AdamW, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_optimizer_state_is_created_without_touching_the_weights(build):
    weight = torch.nn.Parameter(torch.randn(3, 4))
    before = weight.detach().clone()
    optimizer = build([weight])
    create_optimizer_state(optimizer)
    assert torch.equal(weight, before)
    assert weight.grad is None
    assert optimizer.state[weight]
    assert all(not value.any() for value in optimizer.state[weight].values())

    # The first real step is that of an untouched optimizer.
    reference = torch.nn.Parameter(before.clone())
    plain = build([reference])
    gradient = torch.randn(3, 4)
    for parameter, opt in ((weight, optimizer), (reference, plain)):
        parameter.grad = gradient.clone()
        opt.step()
    assert torch.equal(weight, reference)
