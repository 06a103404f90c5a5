"""Metrics as functions of sums, so that a world of any size reports the same number.

Whatever a metric is made of is added up over batches and ranks first: a confusion matrix, sums of errors, counts of scores.
A metric that is averaged over batches or ranks is another one (the mean of two F1 scores is no F1 score).
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LESS_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_byte", "mae", "rmse", "wer", "cer"}) | {
    "word_perplexity",
    "byte_perplexity",
    "frechet",
}
"""Metrics that improve by falling; of all others more is better."""
NUM_SCORE_BINS = 2**16  # one per bf16 number: AUC is exact for scores rounded to bf16, ties included
MOST_SCORED_LABELS = 32  # labels of which the scores are counted, 512 KiB each in fp32


def confusion_counts(predicted: Tensor, labels: Tensor, num_labels: int, *, ignored: int) -> Tensor:
    """Return how often each label was predicted as which one: fp32 ``(C, C)``, a row per true label but ``ignored``."""
    counted = labels != ignored
    cells = torch.where(counted, labels, 0) * num_labels + predicted
    return _count(cells, counted, num_labels**2).view(num_labels, num_labels)


def score_counts(scores: Tensor, is_positive: Tensor, counted: Tensor) -> Tensor:
    """Return how often each bf16 score occurs among counted negatives and positives: fp32 ``(2, NUM_SCORE_BINS)``."""
    bits = (scores.bfloat16() + 0.0).view(torch.int16).long()  # -0.0 is 0.0
    ranks = torch.where(bits < 0, -1 - (bits & 0x7FFF), bits) + NUM_SCORE_BINS // 2
    cells = is_positive * NUM_SCORE_BINS + ranks
    return _count(cells, counted, 2 * NUM_SCORE_BINS).view(2, NUM_SCORE_BINS)


def label_scores(logits_NC: Tensor, labels_NC: Tensor, *, ignored: int) -> Tensor:
    """Return :func:`score_counts` of each label that is there or not: fp32 ``(C, 2, NUM_SCORE_BINS)``."""
    columns = zip(logits_NC.unbind(dim=1), labels_NC.unbind(dim=1), strict=True)
    return torch.stack([score_counts(logits, labels == 1, labels != ignored) for logits, labels in columns])


def _count(cells: Tensor, counted: Tensor, num_cells: int) -> Tensor:
    return torch.zeros(num_cells, device=cells.device).index_add_(0, cells.flatten(), counted.flatten().float())


def binary_counts(predicted: Tensor, labels: Tensor, *, ignored: int) -> Tensor:
    """Return true and false positives, false and true negatives of each label: fp32 ``(4, C)``."""
    is_true, is_false = labels == 1, (labels != 1) & (labels != ignored)
    cells = (predicted & is_true, predicted & is_false, ~predicted & is_true, ~predicted & is_false)
    return torch.stack([cell.sum(dim=0) for cell in cells]).float()


def one_against_rest(confusion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the counts of :func:`binary_counts` for each label of a confusion matrix ``(C, C)``, a row per true label."""
    hits, predicted, true = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    return np.stack([hits, predicted - hits, true - hits, confusion.sum() - predicted - true + hits])


def scores_of_labels(counts: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Return precision, recall and F1 of each label, ``(C,)``, 0 for 0/0; micro averages of summed counts."""
    hits, false, missed, _ = counts
    return {
        "precision": _ratio(hits, hits + false),
        "recall": _ratio(hits, hits + missed),
        "f1": _ratio(2 * hits, 2 * hits + false + missed),
    }


def label_metrics(confusion: NDArray[np.float64]) -> dict[str, float]:
    """Return accuracy, Matthews' correlation, and precision, recall and F1 as means over the labels that occur.

    ``confusion`` is ``(C, C)``, a row per true label. With one label per sample all micro averages are the accuracy.
    """
    occurs = (confusion.sum(axis=0) + confusion.sum(axis=1)) > 0
    scores = scores_of_labels(one_against_rest(confusion))
    means = {name: float(values[occurs].mean()) for name, values in scores.items() if occurs.any()}
    accuracy = float(_ratio(np.trace(confusion), confusion.sum()))
    return {"accuracy": accuracy, **means, "mcc": matthews_correlation(confusion)}


def matthews_correlation(confusion: NDArray[np.float64]) -> float:
    """Return Gorodkin's R_K of a confusion matrix ``(C, C)`` (https://doi.org/10.1016/j.compbiolchem.2004.09.006); 0 if undefined."""
    total, predicted, true = confusion.sum(), confusion.sum(axis=0), confusion.sum(axis=1)
    covariance = np.trace(confusion) * total - predicted @ true
    variances = (total**2 - predicted @ predicted) * (total**2 - true @ true)
    return float(_ratio(covariance, np.sqrt(variances)))


def area_under_roc(counts: NDArray[np.float64]) -> float:
    """Return the chance that a positive scores above a negative, ties half, by counts ``(2, bins)``."""
    negatives, positives = counts
    below = np.cumsum(negatives) - negatives
    pairs = negatives.sum() * positives.sum()
    return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else float("nan")


def mean_area_under_roc(counts: NDArray[np.float64]) -> float:
    """Return the mean of :func:`area_under_roc` over the labels, ``(C, 2, bins)``, that have one; NaN if none has."""
    areas = [area for area in map(area_under_roc, counts) if area == area]
    return float(np.mean(areas)) if areas else float("nan")


def binary_metrics(counts: NDArray[np.float64]) -> dict[str, float]:
    """Return metrics of several labels a sample, by their :func:`binary_counts`: micro means, and means over labels."""
    micro, each = scores_of_labels(counts.sum(axis=1, keepdims=True)), scores_of_labels(counts)
    return {
        "accuracy": float(_ratio(counts[0].sum() + counts[3].sum(), counts.sum())),
        **{name: float(value[0]) for name, value in micro.items()},
        **{f"{name}_macro": float(values.mean()) for name, values in each.items()},
    }


def scores_by_label(sums: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    """Return precision, recall and F1 of each label from the sums of a classifier, and AUC of several labels a sample."""
    if "confusion" in sums:
        return scores_of_labels(one_against_rest(sums["confusion"]))
    if "by_label" not in sums:
        return {}
    areas = {"auc": np.array(list(map(area_under_roc, sums["scores"])))} if "scores" in sums else {}
    return scores_of_labels(sums["by_label"]) | areas


def regression_sums(predicted: Tensor, values: Tensor, counted: Tensor) -> Tensor:
    """Return count, sums of absolute and squared errors, of values and of squared values: fp32 ``(2, 5)``.

    The variance of values far from 0 is a small difference of large sums, which fp32 does not hold. So each is two parts
    that add up to it, of which the large one has so few bits that fp32 adds many of them up exactly.
    """
    errors = torch.where(counted, predicted - values, 0).double()
    values = torch.where(counted, values, 0).double()
    sums = torch.stack([counted.sum(), errors.abs().sum(), (errors**2).sum(), values.sum(), (values**2).sum()])
    large = sums.bfloat16()
    return torch.stack([large.float(), (sums - large).float()])


def regression_metrics(sums: NDArray[np.float64]) -> dict[str, float]:
    """Return MAE, RMSE and R² from the sums of :func:`regression_sums`."""
    count, absolute, squares, values, value_squares = sums.sum(axis=0)
    variance = value_squares - values**2 / count
    return {
        "mae": float(absolute / count),
        "rmse": float(np.sqrt(squares / count)),
        "r2": float(1 - squares / variance) if variance > 0 else float("nan"),
    }


def _ratio(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(numerator, denominator, out=np.zeros_like(denominator, dtype=np.float64), where=denominator != 0)
