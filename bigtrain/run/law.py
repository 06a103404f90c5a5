"""How the loss falls with the size of model and data: Chinchilla's law L(N, D) = E + A / N^alpha + B / D^beta.

Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022, section 3.3 and appendix D.3: the logarithm of the
law is fitted to that of the losses, with Huber's loss, from several starts.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bigtrain.errors import DataError
from bigtrain.plan.estimate import measure_model
from bigtrain.run.directory import read_config
from bigtrain.telemetry import names
from bigtrain.telemetry.history import read_history

HUBER = 1e-3  # beyond which a residual of the logarithm counts linearly
RESAMPLED = 200  # bootstrap samples
ITERATIONS = 300
Array = NDArray[np.float64]
_STARTS = ((-1.0, 0.0, 1.0), (0.0, 5.0, 10.0), (0.2, 0.6, 1.2), (0.0, 5.0, 10.0), (0.2, 0.6, 1.2))


@dataclass(frozen=True, slots=True)
class Point:
    """A finished run."""

    name: str
    parameters: int  # N
    size: float  # D: tokens or samples of its data that it has seen, each counted once
    passes: float  # over them
    loss: float  # of its last validation
    unit: str


@dataclass(frozen=True, slots=True)
class Law:
    """The law of one fit; a term that no run varies is part of ``E``, and 0."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: float, size: float) -> float:
        return self.E + sum(self.terms(parameters, size))

    def terms(self, parameters: float, size: float) -> tuple[float, float]:
        """Return what a model of finite size and finite data add to the loss."""
        return self.A * parameters**-self.alpha, self.B * size**-self.beta

    def best(self, compute: float, passes: float, like: Point) -> tuple[float, float]:
        """Return N and D of the least loss with 6 N D operations a pass; a size that no run varies is that of ``like``."""
        product = compute / 6 / passes
        if not self.A or not self.B:
            return (like.parameters, product / like.parameters) if self.B else (product / like.size, like.size)
        if self.alpha <= 0 or self.beta <= 0:  # in a sample of runs that do not show one of them
            return math.nan, math.nan
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = ratio * product ** (self.beta / (self.alpha + self.beta))
        return parameters, product / parameters


def read_point(directory: Path) -> Point:
    """Return a run as a point of the law; DataError if it has no validation."""
    history = read_history(directory)
    validations, last = history.events_of("validation"), history.records[-1]
    if not validations:
        raise DataError(f"{directory}: it has no validation; validation.every_steps says how often there is one")
    if (loss := validations[-1][names.LOSS]) is None:
        raise DataError(f"{directory}: the loss of its last validation is no number; leave this run out")
    unit = names.unit_of(last)
    passes = max([1.0, *(history.series(key)[1][-1] for key in history.family(names.SOURCE_EPOCHS))])
    parameters = measure_model(read_config(directory).model)[0].total
    return Point(history.name, parameters, last[unit] / passes, passes, float(loss), unit)


def fit(points: Sequence[Point]) -> tuple[Law, list[Law]]:
    """Return the law of some runs, and those of bootstrap samples of them, for intervals.

    DataError: there are too few runs, or all of one size.
    """
    sizes = np.log([[point.parameters, point.size] for point in points])
    losses = np.log([point.loss for point in points])
    varies = (np.ptp(sizes, axis=0) > 0.05).tolist()
    if not any(varies) or len(points) < 2 + 2 * sum(varies):
        needed = "sizes of model and data" if not any(varies) else f"{2 + 2 * sum(varies)} runs or more"
        raise DataError(f"a law needs {needed}: data.max_train_samples=1000,2000,4000,8000 makes nested sizes of data")
    grid = [start if used else (0.0,) for start, used in zip(_STARTS, [True, *np.repeat(varies, 2)], strict=True)]
    starts = np.array(list(itertools.product(*grid)))
    found, costs = _minimised(starts, sizes[None], losses[None], varies)
    best = found[costs.argmin()]
    rows = np.random.default_rng(0).integers(0, len(points), (RESAMPLED, len(points)))
    again, _ = _minimised(np.tile(best, (RESAMPLED, 1)), sizes[rows], losses[rows], varies)
    return _law(best, varies), [_law(values, varies) for values in again]


def _minimised(values: Array, x: Array, y: Array, varies: list[bool]) -> tuple[Array, Array]:
    """Return e, a, alpha, b, beta ``(S, 5)`` of S problems with R runs, and their costs, by Levenberg's method.

    ``x`` are logarithms of N and D, ``(S, R, 2)``, ``y`` those of losses. Residuals beyond ``HUBER`` weigh less in each
    iteration, so that they count linearly.
    """
    used = np.array([0.0, *(0.0 if used else -np.inf for used in varies)])

    def at(values: Array) -> tuple[Array, Array, Array]:
        e, a, alpha, b, beta = (column[:, None] for column in values.T)
        terms = np.stack(np.broadcast_arrays(e, a - alpha * x[..., 0], b - beta * x[..., 1]), axis=-1) + used
        shares = np.exp(terms - (total := np.logaddexp.reduce(terms, axis=-1))[..., None])
        of_model, of_data = shares[..., 1], shares[..., 2]
        slopes = (shares[..., 0], of_model, -of_model * x[..., 0], of_data, -of_data * x[..., 1])
        size = abs(total - y)
        cost = np.where(size < HUBER, size**2 / 2, HUBER * (size - HUBER / 2)).sum(axis=1)
        return total - y, np.stack(np.broadcast_arrays(*slopes), axis=-1), cost

    damping = np.full(len(values), 1e-2)
    for _ in range(ITERATIONS):
        residual, slope, cost = at(values)
        weighted = slope * np.minimum(1.0, HUBER / np.maximum(abs(residual), 1e-300))[..., None]
        curvature = np.einsum("srp,srq->spq", weighted, slope)
        steep = np.einsum("srp,sr->sp", weighted, residual)
        ridge = damping[:, None] * np.einsum("spp->sp", curvature) + 1e-15
        step = np.linalg.solve(curvature + ridge[..., None] * np.eye(5), steep[..., None])[..., 0]
        is_better = at(values - step)[2] < cost
        values = np.where(is_better[:, None], values - step, values)
        damping = np.clip(np.where(is_better, damping / 3, damping * 4), 1e-12, 1e12)
    return values, at(values)[2]


def _law(values: Array, varies: list[bool]) -> Law:
    e, a, alpha, b, beta = values.tolist()
    return Law(math.exp(e), math.exp(a) * varies[0], alpha, math.exp(b) * varies[1], beta)


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Return the 5th and the 95th percentile of those that are numbers."""
    low, high = np.nanpercentile(numbers, [5, 95])
    return float(low), float(high)
