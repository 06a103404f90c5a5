"""Batches of optimizer steps, prepared ahead in a background thread, and batches for validation."""

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from queue import SimpleQueue
from threading import Thread
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from bigtrain.data.order.cursor import Cursor, chain_digest
from bigtrain.data.order.permutation import rank_share
from bigtrain.data.read.batch import Batch
from bigtrain.data.read.stream import SampleStream
from bigtrain.errors import DataError
from bigtrain.tasks.base import Objective

_IDS_AT_ONCE = 4096
_SIZE_AT_ONCE, _STEPS_AT_ONCE = 262_144, 64  # small steps: each wake-up costs the trainer Python's lock


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one rank computes in one optimizer step."""

    step: int  # optimizer step, from 0
    micro_batches: list[Batch]  # micro-batches in the order of accumulation
    num_targets: float  # counted targets of this rank, or what they weigh, all micro-batches together
    global_num_targets: int | None  # of all ranks, where that is known without a collective
    before: Cursor  # where the data stands before the step
    after: Cursor  # where it stands after the step


class TrainLoader:
    """Iterator over optimizer steps, without end; its only state is the cursor, the same at any world size."""

    wait_seconds = 0.0  # how long the last step was waited for

    def __init__(
        self,
        stream: SampleStream,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        start: Cursor,
        prefetch_steps: int,
        pin_memory: bool,
        objective: Objective,
    ) -> None:
        stream.require_samples()
        self._stream = stream
        self._global_batch_size = global_batch_size
        self._share = rank_share(global_batch_size, dp_rank, dp_size)
        self._micro_batch_size = micro_batch_size
        self._num_micro_batches = _micro_batches(global_batch_size, micro_batch_size, dp_size)
        step_size = self._num_micro_batches * micro_batch_size * stream.sample_size
        self._steps_at_once = 1 if stream.is_live else min(max(_SIZE_AT_ONCE // step_size, 1), _STEPS_AT_ONCE)
        self._pin_memory = pin_memory
        self._objective = objective
        self._cursor = start
        self._block_first, self._block = 0, np.empty(0, dtype=np.int64)
        self._is_closing = False
        self._at_hand: deque[StepBatch] = deque()
        # Queues in C: futures of an executor take as long per step as to fill the batch.
        self._wanted: SimpleQueue[None] = SimpleQueue()
        self._ready: SimpleQueue[list[StepBatch] | BaseException] = SimpleQueue()
        # A new thread would use GPU 0, whichever GPU this rank has.
        device = torch.cuda.current_device() if pin_memory else None
        self._thread = Thread(target=self._work, args=(device,), name="data", daemon=True)
        self._thread.start()
        for _ in range(math.ceil(prefetch_steps / self._steps_at_once)):
            self._wanted.put(None)

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> StepBatch:
        """Return the next step. Re-raises an error of the background thread, in its turn; iteration ends."""
        self.wait_seconds = 0.0
        if not self._at_hand:
            begin = time.perf_counter()
            batches = self._ready.get()
            self.wait_seconds = time.perf_counter() - begin
            if isinstance(batches, BaseException):
                self._ready.put(batches)  # whoever asks again must not wait for ever
                raise batches
            self._wanted.put(None)
            self._at_hand.extend(batches)
        return self._at_hand.popleft()

    def __enter__(self) -> "TrainLoader":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the background thread; at most the steps in progress are waited for. May be called again."""
        self._is_closing = True
        self._at_hand.clear()
        self._wanted.put(None)
        self._thread.join()
        self._ready.put(RuntimeError("the loader is closed"))

    def _work(self, device: int | None) -> None:
        if device is not None:
            torch.cuda.set_device(device)
        self._wanted.get()
        while not self._is_closing:
            try:
                batches = self._load_some()
            except BaseException as error:  # whatever it is, somebody waits for an answer
                self._ready.put(error)
                return
            self._cursor = batches[-1].after
            self._ready.put(batches)
            del batches  # their memory is used again when nobody holds it
            self._wanted.get()

    def _load_some(self) -> list[StepBatch]:
        """Return the next steps; just the next one if a local shard is damaged after it."""
        ids = self._ids(self._cursor.samples)
        self._stream.prefetch(self._cursor.samples)
        try:
            return self._load(self._cursor, ids)
        except DataError:
            if len(ids) == 1 or self._stream.is_remote:  # to be patient with a server once is enough
                raise
            return self._load(self._cursor, ids[:1])

    def _load(self, cursor: Cursor, ids: NDArray[np.int64]) -> list[StepBatch]:
        # A rank without samples of its own still computes, so that the others need not wait for it in vain.
        own = slice(self._share.start, self._share.stop) if self._share else slice(1)
        positions = np.arange(cursor.samples, cursor.samples + ids.size).reshape(ids.shape)
        samples = self._stream.gather(ids[:, own].reshape(-1), positions[:, own].reshape(-1))
        places = self._num_micro_batches * self._micro_batch_size
        filling = {name: field.filling for name, field in self._objective.fields.items()}
        samples = samples.padded(len(ids), places, num_kept=len(self._share), filling=filling)
        num_targets, global_num_targets = self._count_targets(samples, len(ids))
        if self._pin_memory:
            samples = samples.pin_memory()
        micro_batches = iter(samples.split(self._micro_batch_size))
        batches = []
        for number, step_ids in enumerate(ids):
            mine = list(islice(micro_batches, self._num_micro_batches))
            digest = chain_digest(cursor.digest, step_ids, self._stream.content)
            after = Cursor(cursor.step + 1, cursor.samples + len(step_ids), digest)
            batches.append(StepBatch(cursor.step, mine, num_targets[number], global_num_targets, cursor, after))
            cursor = after
        return batches

    def _count_targets(self, samples: Batch, num_steps: int) -> tuple[list[float], int | None]:
        """Return how many targets of this rank count in each step, and of all ranks if that is known."""
        length = self._stream.sequence_length
        if length and self._stream.is_full and self._objective.counts_by_shape:
            return [len(self._share) * length] * num_steps, self._global_batch_size * length
        # numpy, because every thread that calls torch gets its own set of OpenMP threads
        counts = self._objective.count({name: tensor.numpy() for name, tensor in samples.items()})
        return counts.reshape(num_steps, -1).sum(axis=1).tolist(), None

    def _ids(self, first: int) -> NDArray[np.int64]:
        """Return the samples of the next steps, one row each, from a block of more: one by one costs more."""
        size = self._global_batch_size
        if not self._block_first <= first < self._block_first + len(self._block):
            num_steps = 1 if self._stream.is_live else max(_IDS_AT_ONCE // size, self._steps_at_once)
            try:
                self._block_first, self._block = first, self._stream.ids(first, num_steps * size)
            except DataError:  # near the end of the data
                self._block_first, self._block = first, self._stream.ids(first, size)
        return self._block[first - self._block_first :][: self._steps_at_once * size].reshape(-1, size)


def validation_batches(
    stream: SampleStream,
    *,
    batches: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    objective: Objective,
) -> Iterator[list[Batch]]:
    """Yield this rank's micro-batches of each of ``batches`` global batches, the same samples every time.

    ``min(batches * global_batch_size, num_samples)`` are taken at equal distances from the whole split, exactly once
    over all ranks. Every rank yields as many micro-batches, filled up with padding.
    """
    stream.require_samples()
    num_samples = stream.num_samples
    num_chosen = min(batches * global_batch_size, num_samples)
    share = rank_share(global_batch_size, dp_rank, dp_size)
    filling = {name: field.filling for name, field in objective.fields.items()}
    for global_batch in range(math.ceil(num_chosen / global_batch_size)):
        micro_batches = []
        for number in range(_micro_batches(global_batch_size, micro_batch_size, dp_size)):
            in_batch = share.start + number * micro_batch_size + np.arange(micro_batch_size)
            places = in_batch + global_batch * global_batch_size
            is_chosen = (in_batch < share.stop) & (places < num_chosen)
            ids = np.where(is_chosen, places * num_samples // num_chosen, 0)
            batch = stream.gather(ids)
            for name, tensor in batch.items():
                tensor[torch.from_numpy(~is_chosen)] = filling[name]
            micro_batches.append(batch)
        yield micro_batches


def require_validation_targets(
    stream: SampleStream, *, batches: int, global_batch_size: int, objective: Objective
) -> None:
    """Refuse to validate on samples, chosen as by :func:`validation_batches`, of which no target counts."""
    stream.require_samples()
    if not stream.has_answers:
        return
    whole = {"global_batch_size": global_batch_size, "micro_batch_size": 1, "dp_rank": 0, "dp_size": 1}
    found = validation_batches(stream, batches=batches, objective=objective, **whole)
    if not any(count_targets(objective, batch) for micro_batches in found for batch in micro_batches):
        raise DataError(
            f"no target that counts is in the samples of {stream.sequence_length} tokens that validation.batches={batches} "
            f"takes of {stream.num_samples}, only prompts whose answers are elsewhere; use more of them, a larger "
            "data.sequence_length, data.validation_fraction or data.packing=best_fit"
        )


def count_targets(objective: Objective, batch: Batch) -> float:
    """Return how many targets of a batch on the host count, or what they weigh."""
    return objective.count({name: tensor.numpy() for name, tensor in batch.items()}).sum().item()


def _micro_batches(global_batch_size: int, micro_batch_size: int, dp_size: int) -> int:
    return math.ceil(len(rank_share(global_batch_size, 0, dp_size)) / micro_batch_size)
