"""Batches of optimizer steps, prepared ahead in a background thread, and batches for validation."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from bigtrain.data.batch import IGNORE_INDEX, Batch, build_batch
from bigtrain.data.corpus import Split
from bigtrain.data.order import rank_slice, sample_ids
from bigtrain.data.skips import pieces
from bigtrain.errors import DataError


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one rank computes in one optimizer step."""

    step: int
    """Optimizer step, from 0."""
    micro_batches: list[Batch]
    """Micro-batches in the order of accumulation."""
    num_targets: int
    """Counted targets of this rank, all micro-batches together."""


class TrainLoader:
    """Iterator over the optimizer steps ``first_step, first_step + 1, ...`` without end.

    The only state is the step: a loader that starts at ``first_step`` continues exactly where one
    that was stopped before it would have gone on, whatever the world size of either.
    """

    def __init__(
        self,
        split: Split,
        *,
        sequence_length: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        first_step: int,
        prefetch_steps: int,
        pin_memory: bool,
        skipped: Sequence[Sequence[int]] = (),
    ) -> None:
        """Start to prepare ``prefetch_steps`` steps in the background.

        Args:
            split: Where the samples are.
            sequence_length: Tokens per sample.
            global_batch_size: Samples per optimizer step over all ranks.
            micro_batch_size: Samples per micro-batch of this rank.
            dp_rank: Position of this rank among those that split the data.
            dp_size: Number of such ranks.
            seed: Seed of the order.
            first_step: Optimizer step to begin with.
            prefetch_steps: Steps kept ready, at least 1.
            pin_memory: Put the batches into page-locked memory.
            skipped: Ranges of positions of the order that the run leaves out; see :mod:`bigtrain.data.skips`.

        Raises:
            DataError: the split is shorter than one sample.
        """
        self._split = split
        self._sequence_length = sequence_length
        self._num_samples = _require_samples(split, sequence_length)
        self._global_batch_size = global_batch_size
        self._slices = _rank_slices(global_batch_size, micro_batch_size, dp_rank, dp_size)
        self._seed = seed
        self._pin_memory = pin_memory
        self._skipped = skipped
        # A new thread would use GPU 0, whichever GPU this rank has.
        initializer, device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if pin_memory else (None, ())
        self._executor = ThreadPoolExecutor(1, "data", initializer, device)
        self._next_step = first_step
        self._ready: deque[Future[StepBatch]] = deque()
        for _ in range(prefetch_steps):
            self._prepare_next()

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> StepBatch:
        """Return the next step; an error of the background thread is raised here, in its turn."""
        batch = self._ready.popleft().result()
        self._prepare_next()
        return batch

    def __enter__(self) -> "TrainLoader":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the background thread; at most the step in progress is waited for. May be called again."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _prepare_next(self) -> None:
        self._ready.append(self._executor.submit(self._load, self._next_step))
        self._next_step += 1

    def _load(self, step: int) -> StepBatch:
        first = step * self._global_batch_size
        ranges = pieces(first, self._global_batch_size, self._skipped)
        ids = np.concatenate([sample_ids(a, b - a, self._num_samples, self._seed) for a, b in ranges])
        # Piece by piece: arrays of a whole step would be fresh memory, with its page faults, every time.
        batches = [_load_batch(self._split, ids[part], self._sequence_length) for part in self._slices]
        # numpy, because every thread that calls torch gets its own set of OpenMP threads
        num_targets = sum(int(np.count_nonzero(batch.targets.numpy() != IGNORE_INDEX)) for batch in batches)
        if self._pin_memory:
            batches = [batch.pin_memory() for batch in batches]
        return StepBatch(step, batches, num_targets)


def validation_batches(
    split: Split,
    *,
    sequence_length: int,
    batches: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> Iterator[Batch]:
    """Yield this rank's micro-batches of ``batches`` global batches, the same samples every time.

    ``min(batches * global_batch_size, num_samples)`` samples are taken at equal distances from the
    whole split. Every rank yields the same number of micro-batches, so that collectives cannot wait
    for a missing one; where samples run out, targets are masked. The union over the ranks is exactly
    the chosen samples, for any world and micro-batch.

    Raises:
        DataError: the split is shorter than one sample.
    """
    num_samples = _require_samples(split, sequence_length)
    num_chosen = min(batches * global_batch_size, num_samples)
    slices = _rank_slices(global_batch_size, micro_batch_size, dp_rank, dp_size)
    for global_batch in range(math.ceil(num_chosen / global_batch_size)):
        for part in slices:
            places = np.arange(part.start, part.stop) + global_batch * global_batch_size
            is_chosen = places < num_chosen
            ids = np.where(is_chosen, places * num_samples // num_chosen, 0)
            batch = _load_batch(split, ids, sequence_length)
            batch.targets[torch.from_numpy(~is_chosen)] = IGNORE_INDEX
            yield batch


def _rank_slices(global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[slice]:
    num_micro_batches = global_batch_size // (dp_size * micro_batch_size)
    return [rank_slice(global_batch_size, micro_batch_size, dp_rank, dp_size, i) for i in range(num_micro_batches)]


def _require_samples(split: Split, sequence_length: int) -> int:
    num_samples = split.num_samples(sequence_length)
    if num_samples < 1:
        raise DataError(
            f"the {split.name} split is shorter than one sample of {sequence_length} + 1 tokens; "
            "use more text, a larger share (data.validation_fraction) or a smaller data.sequence_length"
        )
    return num_samples


def _load_batch(split: Split, ids: NDArray[np.int64], sequence_length: int) -> Batch:
    return build_batch(split.gather(ids, sequence_length), split.counted_targets(ids, sequence_length))
