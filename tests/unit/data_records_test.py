"""Records: the order, the columns and what is said of a row that does not fit."""

import dataclasses

import numpy as np
import pytest
import torch

from bigtrain.cli import own_parts
from bigtrain.config import ComponentConfig, DataConfig, DataSource
from bigtrain.data.order.cursor import Cursor
from bigtrain.data.read.loader import TrainLoader, count_targets, validation_batches
from bigtrain.data.read.records import Arrays, Records, held_out, read_npz, split_records
from bigtrain.data.read.stream import SampleStream
from bigtrain.data.streams import open_streams
from bigtrain.errors import DataError
from bigtrain.tasks.base import IGNORE_INDEX, Field

ROWS, GLOBAL_BATCH, NEW = 23, 5, Cursor()


class Labels:
    """An objective that counts labels; ``bag`` is of any length if it is a sequence."""

    def __init__(self, **fields):
        self.fields = fields | {"label": Field(torch.int64, (), ignored=IGNORE_INDEX)}
        self.sums, self.counts_by_shape = {}, False

    def count(self, samples):
        return (samples["label"] != IGNORE_INDEX).astype(np.int64)


IMAGES = Labels(pixels=Field(torch.float32, (1, "H", "W")))
BAGS = Labels(bag=Field(torch.int64, ("T",), padding=7))


class Images:
    """Rows that say which they are; read one by one."""

    fingerprint = "images-1"

    def __init__(self, num_rows=ROWS):
        self.num_rows = num_rows

    def __len__(self):
        return self.num_rows

    def __getitem__(self, row):
        return {"pixels": np.full((1, 2, 3), row, dtype=np.float32), "label": row}


class Turned(Images):
    """Rows that depend on their position in the run."""

    def gather(self, rows, positions):
        pixels = np.broadcast_to(
            rows[:, None, None, None] + positions[:, None, None, None] / 1000, (len(rows), 1, 2, 3)
        )
        return {"pixels": pixels.astype(np.float32), "label": rows}


def splits_of(source, objective=IMAGES, sequence_length=None, validation_fraction=0.2):
    return split_records(
        source,
        objective,
        where="stars",
        sequence_length=sequence_length,
        validation_fraction=validation_fraction,
    )


def stream_of(split, name="train", **settings):
    data = DataConfig(source=DataSource.records, **settings)
    return SampleStream(name, {"data": split}, data, seed=3, global_batch_size=GLOBAL_BATCH)


def steps_of(stream, dp_size, micro_batch_size=2, start=NEW, count=6):
    """Return, of each step, the samples that count over all ranks, in the order of the step, and the digest."""
    loaders = [
        TrainLoader(
            stream,
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=micro_batch_size,
            dp_rank=rank,
            dp_size=dp_size,
            start=start,
            prefetch_steps=2,
            pin_memory=False,
            objective=IMAGES,
        )
        for rank in range(dp_size)
    ]
    steps = []
    for _ in range(count):
        batches = [next(loader) for loader in loaders]
        rows = [
            (int(label), pixels.flatten().tolist())
            for batch in batches
            for micro_batch in batch.micro_batches
            for pixels, label in zip(micro_batch["pixels"], micro_batch["label"], strict=True)
            if label != IGNORE_INDEX
        ]
        assert sum(batch.num_targets for batch in batches) == len(rows) == GLOBAL_BATCH
        assert len({len(batch.micro_batches) for batch in batches}) == 1, "ranks wait for each other"
        steps.append((rows, batches[0].after))
    for loader in loaders:
        loader.close()
    return steps


@pytest.mark.parametrize("dataset", [Images(), Turned()])
def test_any_number_of_ranks_and_a_resume_have_the_same_samples(dataset):
    stream = stream_of(splits_of(dataset)["train"])
    whole = steps_of(stream, 1)
    for dp_size in (2, 3, 7):
        assert steps_of(stream, dp_size) == whole
    assert steps_of(stream, 3, micro_batch_size=1, start=whole[2][1], count=3) == whole[3:]
    fresh = stream_of(splits_of(dataset)["train"])
    assert fresh.continues(stream.state(whole[4][1], whole[5][1]))
    drawn = [label for rows, _ in whole for label, _ in rows]
    assert len(set(drawn[: stream.num_samples])) == stream.num_samples, "an epoch has every row once"


def test_what_is_augmented_depends_on_the_position_in_the_run():
    split = splits_of(Turned())["train"]
    stream = stream_of(split)
    [(first, _), *others] = steps_of(stream, 2, count=5)
    assert [round(pixels[0] * 1000 - label * 1000) for label, pixels in first] == [0, 1, 2, 3, 4]
    place = {label: pixels for label, pixels in first}
    again = [(label, pixels) for rows, _ in others for label, pixels in rows if label in place]
    assert again and all(pixels != place[label] for label, pixels in again), "another epoch is another augmentation"
    ids = np.arange(3)
    assert torch.equal(stream.gather(ids)["pixels"], stream.gather(ids, ids)["pixels"])


def test_other_rows_are_refused_at_a_resume():
    class Changed(Arrays):
        pass

    columns = {"pixels": np.zeros((ROWS, 1, 2, 3), dtype=np.float32), "label": np.arange(ROWS)}
    stream = stream_of(splits_of(columns)["train"])
    [(_, before), (_, after)] = steps_of(stream, 1, count=2)
    state = stream.state(before, after)
    same = stream_of(splits_of(Changed(columns))["train"])
    assert same.fingerprint == stream.fingerprint and same.continues(state)
    columns["pixels"] = columns["pixels"].copy()
    columns["pixels"][4, 0, 1, 1] = 1e-9
    other = stream_of(splits_of(columns)["train"])
    assert other.fingerprint != stream.fingerprint and not other.continues(state)
    assert not stream_of(splits_of(columns, validation_fraction=0.3)["train"]).continues(state)


def test_validation_is_held_out_or_a_dataset_of_its_own():
    sides = splits_of(Images())
    train, validation = (set(sides[name].rows.tolist()) for name in ("train", "validation"))
    assert train | validation == set(range(ROWS)) and not train & validation and validation
    assert np.array_equal(held_out(10_000, 0.1)[:ROWS], held_out(ROWS, 0.1)), (
        "more rows leave those before where they are"
    )
    assert held_out(10_000, 0.1).mean() == pytest.approx(0.1, abs=0.01) and held_out(2, 1e-9).sum() == 1

    @dataclasses.dataclass
    class Stars:
        num_rows: int = 4

        def train(self):
            return Images(9)

        def validation(self):
            return Images(self.num_rows)

    sides = splits_of(Stars())
    assert len(sides["train"].rows) == 9 and len(sides["validation"].rows) == 4
    stream = stream_of(sides["validation"], name="validation")
    for dp_size in (1, 2, 3):
        sizes = {"batches": 2, "global_batch_size": 3, "micro_batch_size": 2, "dp_size": dp_size, "objective": IMAGES}
        batches = [b for rank in range(dp_size) for m in validation_batches(stream, dp_rank=rank, **sizes) for b in m]
        labels = sorted(label for b in batches for label in b["label"].tolist() if label != IGNORE_INDEX)
        assert labels == [0, 1, 2, 3] and sum(count_targets(IMAGES, b) for b in batches) == 4


def test_sequences_are_filled_up_to_one_length():
    rows = [{"bag": [5] * length, "label": length} for length in (3, 1, 4)]
    samples = Records(rows, BAGS, where="bags", sequence_length=4).read(np.arange(3), np.arange(3))
    assert samples["bag"].tolist() == [[5, 5, 5, 7], [5, 7, 7, 7], [5, 5, 5, 5]] and samples["label"].tolist() == [
        3,
        1,
        4,
    ]
    stream = stream_of(splits_of(rows, BAGS, 4)["train"])
    assert stream.sequence_length == 4 and stream_of(splits_of(Images())["train"]).sequence_length is None


def several(**columns):
    return [{name: values[row] for name, values in columns.items()} for row in range(3)]


@pytest.mark.parametrize(
    ("rows", "objective", "length", "said"),
    [
        (several(bag=[[1], [1, 2], [1]], label=[0, 1, 2]), BAGS, None, r"row 1: bag has the shape \(2,\), not \(1,\); rows are"),
        (several(bag=[[1], [1], [1, 2, 3]], label=[0, 1, 2]), BAGS, 2, r"row 2: bag has the shape \(3,\), not \(2,\); rows are"),
        (several(bag=[[1], [1], [1.5]], label=[0, 1, 2]), BAGS, 2, "row 2: bag is float64; the task needs int64"),
        (several(bag=[[1], [1], [1]], label=[0, "a", 2]), BAGS, 2, "row 1: label is no array of numbers; the task needs int64"),
        (several(bag=[[1], [1], [1]]), BAGS, 2, "row 0: the columns have to be bag, label; it lacks label"),
        (several(bag=[[1], [1], [1]], label=[0, 1, 2], x=[0, 0, 0]), BAGS, 2, "it has x"),
        (several(bag=[1, 1, 1], label=[0, 1, 2]), BAGS, 2, r"row 0: bag has the shape \(\); the task needs \(T,\)"),
        ([*several(bag=[[1], [1], [1]], label=[0, 1, 2]), {"bag": [1]}], BAGS, 2, "row 3: .* it lacks label"),
        ({"pixels": np.zeros((3, 1, 4, 4)), "label": np.zeros(2)}, IMAGES, None, "their lengths are pixels: 3, label: 2"),
        ({"pixels": np.zeros((3, 2, 4, 4)), "label": np.zeros(3, int)}, IMAGES, None, r"not \(3, 1, 4, 4\)"),
        ([([1], 0)], BAGS, 2, "row 0 is a tuple; a row has to be columns by name"),
        (lambda: 3, IMAGES, None, "the train side is a int; it has to have"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_fit_is_named(rows, objective, length, said):
    with pytest.raises(DataError, match=f"^stars: .*{said}") as caught:
        splits_of(rows, objective, length)
    assert "\n" not in str(caught.value)


def test_an_objective_that_counts_padding_is_refused():
    class All(Labels):
        def count(self, samples):
            return np.ones(len(samples["label"]), dtype=np.int64)

    with pytest.raises(DataError, match="counts 1 targets in a sample that is nothing but padding"):
        splits_of(Images(), All(pixels=IMAGES.fields["pixels"]))


def test_a_file_of_arrays_and_a_mixture_of_two(tmp_path):
    for name, first in (("a", 0), ("b", 100)):
        labels = np.arange(first, first + 30)
        np.savez(tmp_path / f"{name}.npz", pixels=np.ones((30, 1, 2, 2), dtype=np.float32), label=labels)
    with pytest.raises(DataError, match=r"c\.npz: there is no such file"):
        read_npz(tmp_path / "c.npz")
    np.savez(tmp_path / "objects.npz", label=np.array([{}]))
    (tmp_path / "text.npz").write_text("label")
    np.save(tmp_path / "single.npy", np.ones((3, 2)))
    with pytest.raises(DataError, match=r"it is one array, without a name; numpy.savez"):
        read_npz(tmp_path / "single.npy")
    for name in ("objects", "text"):
        with pytest.raises(DataError, match=r"reads a \.npz of arrays of numbers"):
            read_npz(tmp_path / f"{name}.npz")
    mixture = {
        name: ComponentConfig(path=str(tmp_path / f"{name}.npz"), weight=w) for name, w in (("a", 3.0), ("b", 1.0))
    }
    data = DataConfig(source=DataSource.records, mixture=mixture, validation_fraction=0.1)
    streams = open_streams(data, {}, vocab_size=1, objective=IMAGES, seed=0, global_batch_size=8)
    labels = streams["train"].gather(streams["train"].ids(0, 40))["label"].numpy()
    assert (labels < 100).sum() == 30 and streams["train"].sequence_length is None
    assert set(streams["train"].progress(40)) == {"a", "b"} and streams["train"].progress(40)["b"][0] == 10
    held = streams["validation"].gather(np.arange(streams["validation"].num_samples))["label"].tolist()
    assert held and not set(held) & set(labels.tolist())


def test_arrays_of_a_program_are_data():
    columns = {"pixels": np.zeros((ROWS, 1, 2, 3)), "label": np.arange(ROWS)}
    [setting] = own_parts.given(network=None, objective=None, data=columns)
    data = DataConfig(source=DataSource.own, path=setting.removeprefix("data="))
    stream = open_streams(data, {}, vocab_size=1, objective=IMAGES, seed=0, global_batch_size=8)["train"]
    assert stream.gather(np.arange(2))["pixels"].dtype == torch.float32 and stream.num_samples > ROWS / 2
