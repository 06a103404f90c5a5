"""Steps whose numbers are not to be trained on: NaN and infinity, and spikes of the loss.

The engines leave out the update of a step whose gradient is not finite, on all ranks alike (a loss that is
not finite makes its gradient so). This module judges afterwards, when the numbers are read back: a few
bad steps are put up with; too many among the last ones send the run back to a checkpoint before the first of
them, and from there on without the samples of the bad stretch (as PaLM's authors did by hand: Chowdhery et
al. 2022, section 5.1). Every rank judges the same numbers, so all come to the same verdict.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bigtrain.config import BadNumbersConfig

REMEMBERED_STEPS = 100
"""Bad steps longer ago than this are forgotten."""


@dataclass(frozen=True, slots=True)
class BadStep:
    """A step that was not to be trained on."""

    step: int
    why: str


@dataclass(frozen=True, slots=True)
class RollBack:
    """The verdict that the run has to go back, and to leave out the steps from the first to the last."""

    first_step: int
    last_step: int


class BadNumbers:
    """The judge of one launch, on every rank."""

    def __init__(self, config: BadNumbersConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.spike_window_steps)
        self._bad: deque[BadStep] = deque()
        self.has_good = False
        """Whether any step was not bad."""

    def judge(self, records: Sequence[dict[str, Any]]) -> tuple[list[BadStep], RollBack | None]:
        """Return the bad ones among the steps since the last call, and whether they are too many.

        Args:
            records: per step ``step, loss, grad_norm`` with the loss of all ranks, in order.
        """
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
    """Return the median of ``window`` and how many standard deviations ``value`` is above it.

    The deviation is estimated from the median of the absolute deviations, times 1.4826, which a few outliers
    do not move (Iglewicz and Hoaglin 1993).
    """
    median = statistics.median(window)
    deviation = 1.4826 * statistics.median(abs(loss - median) for loss in window)
    return median, (value - median) / max(deviation, 1e-6 * abs(median), 1e-12)
