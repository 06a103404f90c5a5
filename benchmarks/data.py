"""How many tokens per second of CPU time does a loader hand out? ``python benchmarks/data.py``.

The same tokens for all sides, shuffled, as int64 batches of tokens and targets. What counts is the CPU time of the
loading process with its threads; sides take turns, figures are medians of their turns. A table for each length of
samples: what a library does once per sample weighs on short ones, copying on long ones. Sides whose library is
not installed are left out (``make bench``).
"""

import argparse
import itertools
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bigtrain.config import DataConfig
from bigtrain.data.order.cursor import Cursor
from bigtrain.data.read.corpus import TokenSplit
from bigtrain.data.read.loader import TrainLoader
from bigtrain.data.read.stream import SampleStream
from bigtrain.tasks.causal_lm import CausalLM

Batches = Iterator[Any]
FLOOR = "gather with a cast"
OURS = "bigtrain"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40_000_000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 2048], help="tokens per sample")
    parser.add_argument("--batch", type=int, default=32, help="samples per batch")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--turn-tokens", type=int, default=3_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        tokens = np.random.default_rng(0).integers(0, 50_000, options.tokens, dtype=np.uint16)
        tokens.tofile(work / "tokens.bin")
        memmap = np.memmap(work / "tokens.bin", dtype=np.uint16, mode="r")
        print(f"{options.tokens:,} tokens; {_machine()}")
        for length in options.lengths:
            (place := work / str(length)).mkdir()
            print_throughput(memmap, place, length, options)
        print_seeking(memmap, options.lengths[-1], options.batch)


def print_throughput(memmap: np.ndarray, work: Path, length: int, options: argparse.Namespace) -> None:
    sides = {name: make(memmap, work, length, options.batch) for name, make in available().items()}
    num_batches = options.turn_tokens // (length * options.batch)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for batches in sides.values():
        next(batches)
    for _ in range(options.turns):
        for name, batches in sides.items():
            rates[name].append(measure(batches, num_batches) * options.batch * length / 1e6)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(
        f"\n{f'batches of {options.batch} x {length}':<28}{'M tokens / CPU s':>18}{'of the floor':>14}{'ours is':>10}"
    )
    for name, rate in medians.items():
        print(f"{name:<28}{rate:>18,.1f}{rate / medians[FLOOR]:>14.3f}{medians[OURS] / rate:>9.1f}x")
    for batches in sides.values():
        batches.close()


def measure(batches: Batches, count: int) -> float:
    """Return batches per second of CPU time, all threads and ended children included."""
    begin = cpu_seconds()
    for batch in itertools.islice(batches, count):
        del batch
    return count / max(cpu_seconds() - begin, 1e-9)


def cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def available() -> dict[str, Callable[[np.ndarray, Path, int, int], Batches]]:
    sides = {
        "memcpy of int64": (memcpy, "numpy"),
        FLOOR: (cast_floor, "numpy"),
        OURS: (ours, "bigtrain"),
        "torch DataLoader, memmap": (torch_loader, "torch"),
        "torch DataLoader, array": (torch_array_loader, "torch"),
        "Grain": (grain_loader, "grain"),
        "litdata": (litdata_loader, "litdata"),
        "MosaicML Streaming": (mds_loader, "streaming"),
        "datasets, map-style": (datasets_map, "datasets"),
        "datasets, streaming": (datasets_streaming, "datasets"),
    }
    return {name: make for name, (make, package) in sides.items() if find_spec(package)}


def memcpy(_tokens: np.ndarray, _work: Path, length: int, batch: int) -> Batches:
    source = np.ones((2, batch, length), dtype=np.int64)
    target = np.empty_like(source)
    while True:
        np.copyto(target, source)
        yield target


def cast_floor(tokens: np.ndarray, _work: Path, length: int, batch: int) -> Batches:
    """Windows in random order into the same memory: no targets of their own, nothing allocated."""
    windows, generator = len(tokens) // length - 1, np.random.default_rng(0)
    target, plain = np.empty((batch, length + 1), dtype=np.int64), tokens.view(np.ndarray)
    while True:
        for row, window in enumerate(generator.integers(0, windows, batch).tolist()):
            target[row] = plain[window * length : window * length + length + 1]
        yield target


def ours(tokens: np.ndarray, _work: Path, length: int, batch: int, start: Cursor | None = None) -> Batches:
    split = TokenSplit("train", tokens.view(np.ndarray), "benchmark")
    stream = SampleStream("train", {"data": split}, DataConfig(sequence_length=length), seed=0, global_batch_size=batch)
    loader = TrainLoader(
        stream,
        global_batch_size=batch,
        micro_batch_size=batch,
        dp_rank=0,
        dp_size=1,
        start=start or Cursor(),
        prefetch_steps=2,
        pin_memory=False,
        objective=CausalLM(),
    )
    with loader:
        yield from loader


class Windows(torch.utils.data.Dataset):
    """Tokens cut into samples, as usually written for a map-style loader."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens, self.length = tokens, length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        window = self.tokens[index * self.length : (index + 1) * self.length + 1].astype(np.int64)
        return torch.from_numpy(window[:-1]), torch.from_numpy(window[1:])


def torch_loader(tokens: np.ndarray, _work: Path, length: int, batch: int) -> Batches:
    while True:
        yield from torch.utils.data.DataLoader(Windows(tokens, length), batch_size=batch, shuffle=True, drop_last=True)


def torch_array_loader(tokens: np.ndarray, work: Path, length: int, batch: int) -> Batches:
    """The same for who knows that slices of ``np.memmap`` cost more than those of a plain array over it."""
    yield from torch_loader(tokens.view(np.ndarray), work, length, batch)


class GrainWindows:
    def __init__(self, tokens: np.ndarray, length: int) -> None:
        self.tokens, self.length = tokens.view(np.ndarray), length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        window = self.tokens[index * self.length : (index + 1) * self.length + 1].astype(np.int64)
        return {"tokens": window[:-1], "targets": window[1:]}


def grain_loader(tokens: np.ndarray, _work: Path, length: int, batch: int) -> Batches:
    import grain.python as grain

    dataset = grain.MapDataset.source(GrainWindows(tokens, length)).shuffle(seed=0).repeat().batch(batch)
    for index in itertools.count():
        yield dataset[index]


def litdata_loader(tokens: np.ndarray, work: Path, length: int, batch: int) -> Batches:
    import litdata
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(
        str(work / "litdata"), chunk_bytes="64MB", item_loader=(item := litdata.TokensLoader(length + 1))
    )
    for index, begin in enumerate(range(0, len(tokens), 100_000)):
        writer[index] = (torch.from_numpy(tokens[begin : begin + 100_000].astype(np.int32)),)
    writer.done()
    writer.merge()
    dataset = litdata.StreamingDataset(str(work / "litdata"), item_loader=item, shuffle=True, drop_last=True)
    while True:
        for window in litdata.StreamingDataLoader(dataset, batch_size=batch, num_workers=0):
            window = window.long()
            yield window[:, :-1], window[:, 1:]


def mds_loader(tokens: np.ndarray, work: Path, length: int, batch: int) -> Batches:
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(work / "mds"), columns={"tokens": "bytes"}, size_limit="64mb") as writer:
        for begin in range(0, len(tokens) - length, length):
            writer.write({"tokens": tokens[begin : begin + length + 1].tobytes()})
    dataset = StreamingDataset(local=str(work / "mds"), shuffle=True, batch_size=batch)
    while True:
        for rows in batched(dataset, batch):
            window = np.stack([np.frombuffer(row["tokens"], dtype=np.uint16).astype(np.int64) for row in rows])
            yield torch.from_numpy(window[:, :-1]), torch.from_numpy(window[:, 1:])


def arrow_windows(tokens: np.ndarray, length: int) -> Any:
    import datasets
    import pyarrow as pa

    count = (len(tokens) - 1) // length
    windows = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length][:count]
    column = pa.FixedSizeListArray.from_arrays(pa.array(windows.ravel()), length + 1)
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("uint16"), length=length + 1)})
    return datasets.Dataset(pa.table({"tokens": column}), info=datasets.DatasetInfo(features=features))


def datasets_map(tokens: np.ndarray, _work: Path, length: int, batch: int) -> Batches:
    dataset = arrow_windows(tokens, length).with_format("torch")
    while True:
        for rows in torch.utils.data.DataLoader(dataset, batch_size=batch, shuffle=True, drop_last=True):
            window = rows["tokens"].long()
            yield window[:, :-1], window[:, 1:]


def datasets_streaming(tokens: np.ndarray, _work: Path, length: int, batch: int) -> Batches:
    dataset = arrow_windows(tokens, length).to_iterable_dataset().shuffle(seed=0, buffer_size=1000).with_format("torch")
    while True:
        for rows in torch.utils.data.DataLoader(dataset, batch_size=batch, drop_last=True):
            window = rows["tokens"].long()
            yield window[:, :-1], window[:, 1:]


def batched(items: Any, count: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while len(rows := list(itertools.islice(iterator, count))) == count:
        yield rows


def print_seeking(memmap: np.ndarray, length: int, batch: int) -> None:
    def first_batch(samples: int) -> float:
        begin = time.perf_counter()
        batches = ours(memmap, Path(), length, batch, Cursor(samples // batch, samples))
        next(batches)
        seconds = time.perf_counter() - begin
        batches.close()
        return seconds * 1000

    skipped = 10_000
    places = {"the beginning": 0, f"batch {skipped:,}": skipped * batch, "sample 10^9": 10**9}
    print()
    milliseconds = {name: statistics.median(first_batch(place) for _ in range(9)) for name, place in places.items()}
    for name, value in milliseconds.items():
        print(f"first batch from {name:<18}{value:>10.1f} ms")
    begin = time.perf_counter()
    for skipped_batch in itertools.islice(torch_array_loader(memmap, Path(), length, batch), skipped):
        del skipped_batch
    skipping = (time.perf_counter() - begin) * 1000
    print(
        f"skipping {skipped:,} batches (DataLoader){skipping:>7.0f} ms: {skipping / milliseconds[f'batch {skipped:,}']:,.0f}x"
    )


def _machine() -> str:
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "numpy")]
    return f"{os.cpu_count()} cores, {platform.machine()}, {', '.join(versions)}"


if __name__ == "__main__":
    main()
