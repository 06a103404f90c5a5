"""How the loss falls with the size of model and data: Chinchilla's law L(N, D) = E + A / N^alpha + B / D^beta.

Hoffmann et al., "Training Compute-Optimal Large Language Models", 2022, section 3.3 and appendix D.3: the logarithm of the
law is fitted to that of the losses by L-BFGS, with Huber's loss, from several starts.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bigtrain.errors import DataError
from bigtrain.plan.estimate import measure_model
from bigtrain.run.directory import read_config
from bigtrain.telemetry import names
from bigtrain.telemetry.history import read_history

HUBER = 1e-3  # beyond which a residual of the logarithm counts linearly
RESAMPLED = 200  # bootstrap samples
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
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = ratio * product ** (self.beta / (self.alpha + self.beta))
        return parameters, product / parameters


def read_point(directory: Path) -> Point:
    """Return a run as a point of the law; DataError if it has no validation."""
    history = read_history(directory)
    validations, last = history.events_of("validation"), history.records[-1]
    if not validations:
        raise DataError(f"{directory}: it has no validation; validation.every_steps says how often there is one")
    unit = names.unit_of(last)
    passes = max([1.0, *(history.series(key)[1][-1] for key in history.family(names.SOURCE_EPOCHS))])
    parameters = measure_model(read_config(directory).model)[0].total
    return Point(history.name, parameters, last[unit] / passes, passes, float(validations[-1][names.LOSS]), unit)


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
    x, y = torch.from_numpy(sizes), torch.from_numpy(losses)
    grid = [start if used else (0.0,) for start, used in zip(_STARTS, [True, *np.repeat(varies, 2)], strict=True)]
    starts = torch.tensor(list(itertools.product(*grid)), dtype=torch.float64)
    best = _minimised(starts, x[None].expand(len(starts), -1, -1), y[None].expand(len(starts), -1), varies)
    rows = np.random.default_rng(0).integers(0, len(points), (RESAMPLED, len(points)))
    again = _minimised(best[:1].expand(RESAMPLED, -1).clone(), x[rows], y[rows], varies)
    return _law(best[0], varies), [_law(row, varies) for row in again]


def _minimised(start: Tensor, x: Tensor, y: Tensor, varies: list[bool]) -> Tensor:
    """Return the parameters ``(S, 5)``, e, a, alpha, b, beta, of S problems, the best first if all are of one."""
    values = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([values], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def residuals() -> Tensor:
        e, a, alpha, b, beta = values.unbind(1)
        terms = [e[:, None].expand_as(y)]
        terms += [a[:, None] - alpha[:, None] * x[..., 0]] if varies[0] else []
        terms += [b[:, None] - beta[:, None] * x[..., 1]] if varies[1] else []
        found = torch.stack(terms).logsumexp(dim=0)
        return torch.nn.functional.huber_loss(found, y, delta=HUBER, reduction="none").sum(dim=1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = residuals().sum()
        total.backward()
        return total

    optimizer.step(closure)
    with torch.no_grad():
        is_one = bool((y == y[0]).all())
        return values.detach()[residuals().argsort()] if is_one else values.detach()


def _law(values: Tensor, varies: list[bool]) -> Law:
    e, a, alpha, b, beta = values.tolist()
    return Law(math.exp(e), math.exp(a) * varies[0], alpha, math.exp(b) * varies[1], beta)


def interval(numbers: Sequence[float]) -> tuple[float, float]:
    """Return the 5th and the 95th percentile."""
    low, high = np.percentile(numbers, [5, 95])
    return float(low), float(high)
