"""Slow ranks, by what a rank does alone: a small matmul, for its processor's speed, and its waiting for data.

Step times do not tell: the other ranks wait for the slow one inside collectives.
"""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

CHECK_SECONDS = 30.0  # approximate interval of the comparisons
_REPEATS = 3
_SIZES = {"cpu": 192, "cuda": 4096}


@dataclass(frozen=True, slots=True)
class Straggler:
    rank: int
    why: str


class Stragglers:
    """Compares the ranks now and then; every rank calls :meth:`check` at the same steps."""

    def __init__(self, device: torch.device, factor: float) -> None:
        """Prepare to name ranks ``factor`` times slower than the median; 0 = never."""
        self._device = device
        self._factor = factor
        self._group = dist.new_group(backend="gloo") if factor and dist.get_world_size() > 1 else None
        self._next_step = 0
        self._last: tuple[int, float, float] | None = None  # step, time, data seconds
        self._suspects: set[tuple[int, str]] = set()
        self._named: set[tuple[int, str]] = set()

    def check(self, step: int, data_seconds: float) -> list[Straggler]:
        """Return the ranks that are newly slow, in two comparisons in a row; all ranks call this."""
        if self._group is None or step < self._next_step:
            return []
        now, last = time.monotonic(), self._last
        self._last = (step, now, data_seconds)
        if last is None:  # the first steps are slow for reasons of their own
            self._next_step = step + 1
            return []
        num_steps = step - last[0]
        own = [_probe(self._device), (data_seconds - last[2]) / num_steps, (now - last[1]) / num_steps]
        numbers = [torch.zeros(3, dtype=torch.float64) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(numbers, torch.tensor(own, dtype=torch.float64), group=self._group)
        ranks = [row.tolist() for row in numbers]
        # From numbers that all ranks have: they compare at the same step again.
        self._next_step = step + max(1, math.ceil(CHECK_SECONDS / max(ranks[0][2], 1e-6)))
        found = {(s.rank, s.why.split()[0]): s for s in slow_ranks(ranks, self._factor)}
        sure = self._suspects & found.keys() - self._named
        self._suspects, self._named = set(found), self._named & found.keys() | sure
        return [found[key] for key in sorted(sure)]


def slow_ranks(ranks: Sequence[Sequence[float]], factor: float) -> list[Straggler]:
    """Return the ranks ``factor`` times slower than the median, by seconds of probe, data and step of each."""
    probe, data, step = (statistics.median_low(column) for column in zip(*ranks, strict=True))
    found = []
    for rank, (own_probe, own_data, _) in enumerate(ranks):
        if own_probe > factor * probe:
            found.append(Straggler(rank, f"computes {own_probe / probe:.1f} times slower than the median rank"))
        excess = own_data - data
        if excess > (factor - 1) * (step - excess):
            found.append(Straggler(rank, f"waits {own_data:.3g} s per step for data, the median rank {data:.3g} s"))
    return found


def _probe(device: torch.device) -> float:
    matrix = torch.ones(_SIZES[device.type], _SIZES[device.type], device=device)
    seconds = []
    for _ in range(1 + _REPEATS):
        begin = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
