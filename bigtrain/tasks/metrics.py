"""Metrics as functions of sums, so that a world of any size reports the same number.

Whatever a metric is made of is added up over batches and ranks first: a confusion matrix, sums of errors, counts of scores.
A metric that is averaged over batches or ranks is another one (the mean of two F1 scores is no F1 score).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LESS_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte", "mae", "rmse", "wer", "cer"})
"""Metrics that improve by falling; of all others more is better."""
NUM_SCORE_BINS = 2**16
"""One per bf16 number: AUC is exact for scores rounded to bf16, ties included."""


def confusion_counts(predicted: Tensor, labels: Tensor, num_labels: int, *, ignored: int) -> Tensor:
    """Return how often each label was predicted as which one: fp32 ``(C, C)``, a row per true label.

    Args:
        predicted: int64, any shape.
        labels: int64, the same shape.
        num_labels: C.
        ignored: label that does not count.
    """
    counted = labels != ignored
    cells = torch.where(counted, labels, 0) * num_labels + predicted
    return _count(cells, counted, num_labels**2).view(num_labels, num_labels)


def score_counts(scores: Tensor, is_positive: Tensor, counted: Tensor) -> Tensor:
    """Return how often each bf16 score occurs among negatives and positives: fp32 ``(2, NUM_SCORE_BINS)``, in ascending order.

    Args:
        scores: any shape and floating dtype, finite.
        is_positive: bool, the same shape.
        counted: bool, the same shape; whether a score counts.
    """
    bits = (scores.bfloat16() + 0.0).view(torch.int16).long()  # -0.0 is 0.0
    ranks = torch.where(bits < 0, -1 - (bits & 0x7FFF), bits) + NUM_SCORE_BINS // 2
    cells = is_positive * NUM_SCORE_BINS + ranks
    return _count(cells, counted, 2 * NUM_SCORE_BINS).view(2, NUM_SCORE_BINS)


def _count(cells: Tensor, counted: Tensor, num_cells: int) -> Tensor:
    return torch.zeros(num_cells, device=cells.device).index_add_(0, cells.flatten(), counted.flatten().float())


def scores_of_labels(confusion: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Return precision, recall and F1 of each label, ``(C,)`` each; 0 where they are 0/0, as scikit-learn has it.

    Args:
        confusion: ``(C, C)``, a row per true label.
    """
    hits, predicted, true = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    return {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, true),
        "f1": _ratio(2 * hits, predicted + true),
    }


def label_metrics(confusion: NDArray[np.float64]) -> dict[str, float]:
    """Return accuracy, Matthews' correlation, and precision, recall and F1 as means over the labels that occur.

    With one label per sample, the micro averages of precision, recall and F1 all are the accuracy.

    Args:
        confusion: ``(C, C)``, a row per true label.
    """
    occurs = (confusion.sum(axis=0) + confusion.sum(axis=1)) > 0
    means = {name: float(values[occurs].mean()) for name, values in scores_of_labels(confusion).items() if occurs.any()}
    accuracy = float(_ratio(np.trace(confusion), confusion.sum()))
    return {"accuracy": accuracy, **means, "mcc": matthews_correlation(confusion)}


def matthews_correlation(confusion: NDArray[np.float64]) -> float:
    """Return Gorodkin's R_K of a confusion matrix ``(C, C)`` (https://doi.org/10.1016/j.compbiolchem.2004.09.006); 0 if undefined."""
    total, predicted, true = confusion.sum(), confusion.sum(axis=0), confusion.sum(axis=1)
    covariance = np.trace(confusion) * total - predicted @ true
    variances = (total**2 - predicted @ predicted) * (total**2 - true @ true)
    return float(_ratio(covariance, np.sqrt(variances)))


def area_under_roc(counts: NDArray[np.float64]) -> float:
    """Return the chance that a positive scores above a negative, ties being half: NaN without one of either.

    Args:
        counts: ``(2, bins)`` of negatives and positives in ascending order of the score.
    """
    negatives, positives = counts
    below = np.cumsum(negatives) - negatives
    pairs = negatives.sum() * positives.sum()
    return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else float("nan")


def binary_metrics(counts: NDArray[np.float64]) -> dict[str, float]:
    """Return metrics of labels that are each there or not, several a sample: micro and macro means over labels.

    Args:
        counts: true positives, false positives, false negatives and true negatives of each label, ``(4, C)``.
    """
    hits, false, missed, rejected = counts
    total = counts.sum(axis=1)
    return {
        "accuracy": float(_ratio(hits.sum() + rejected.sum(), counts.sum())),
        "precision": float(_ratio(total[0], total[0] + total[1])),
        "recall": float(_ratio(total[0], total[0] + total[2])),
        "f1": float(_ratio(2 * total[0], 2 * total[0] + total[1] + total[2])),
        "f1_macro": float(_ratio(2 * hits, 2 * hits + false + missed).mean()),
    }


def regression_sums(predicted: Tensor, values: Tensor, counted: Tensor) -> Tensor:
    """Return count, sums of absolute and squared errors, of values and of squared values: fp32 ``(5,)``."""
    errors = torch.where(counted, predicted - values, 0)
    values = torch.where(counted, values, 0)
    return torch.stack([counted.sum(), errors.abs().sum(), (errors**2).sum(), values.sum(), (values**2).sum()]).float()


def regression_metrics(sums: NDArray[np.float64]) -> dict[str, float]:
    """Return MAE, RMSE and R² from the sums of :func:`regression_sums`."""
    count, absolute, squares, values, value_squares = sums
    variance = value_squares - values**2 / count
    return {
        "mae": float(absolute / count),
        "rmse": float(np.sqrt(squares / count)),
        "r2": float(1 - squares / variance) if variance > 0 else float("nan"),
    }


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ratio, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(denominator, dtype=np.float64), where=denominator != 0)
