"""Non-finite steps and loss spikes: which steps are bad, and when to roll back.

Engines skip the update of a step with a non-finite gradient, on all ranks. This module decides when the numbers are
read back: a few bad steps are tolerated; too many roll the run back to the checkpoint before the first of them, and
skip the samples of the bad stretch (Chowdhery et al. 2022, section 5.1). All ranks see the same numbers and decide
alike.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bigtrain.config import BadNumbersConfig

REMEMBERED_STEPS = 100  # bad steps longer ago do not count


@dataclass(frozen=True, slots=True)
class BadStep:
    """A non-finite or spiking step."""

    step: int
    why: str


@dataclass(frozen=True, slots=True)
class RollBack:
    """Roll back, and skip the samples of the steps from the first to the last."""

    first_step: int
    last_step: int


class BadNumbers:
    """Finds the bad steps of a launch, alike on every rank."""

    def __init__(self, config: BadNumbersConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window_steps)
        self._bad: deque[BadStep] = deque()
        self.has_good = False  # whether any step was not bad

    def judge(self, records: Sequence[dict[str, Any]]) -> tuple[list[BadStep], RollBack | None]:
        """Return the bad steps among ``records`` (``step, loss, grad_norm``, in order), and the rollback if one is due."""
        found = []
        for record in records:
            if why := self._fault(record["loss"], record["grad_norm"]):
                found.append(BadStep(record["step"], why))
                self._bad.append(found[-1])
            else:
                self.has_good = True
                self._losses.append(record["loss"])
            while self._bad and self._bad[0].step <= record["step"] - REMEMBERED_STEPS:
                self._bad.popleft()
        if not found or len(self._bad) <= self._config.max_bad_steps:
            return found, None
        return found, RollBack(self._bad[0].step, self._bad[-1].step)

    def _fault(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(grad_norm) or not math.isfinite(loss):
            return f"not finite: loss {loss}, gradient norm {grad_norm}"
        if self._config.spike_zscore and len(self._losses) == self._losses.maxlen:
            median, zscore = robust_zscore(loss, self._losses)
            if zscore > self._config.spike_zscore:
                return f"spike: loss {loss:.4f}, {zscore:.1f} deviations above the median {median:.4f}"
        return None


def robust_zscore(value: float, window: Sequence[float]) -> tuple[float, float]:
    """Return the median of ``window`` and the z-score of ``value`` by 1.4826 times the MAD (Iglewicz and Hoaglin 1993)."""
    median = statistics.median(window)
    deviation = 1.4826 * statistics.median(abs(loss - median) for loss in window)
    return median, (value - median) / max(deviation, 1e-6 * abs(median), 1e-12)
