"""Metrics made of sums are those of scikit-learn on all predictions at once, however the sums were cut."""

import numpy as np
import pytest
import torch

from bigtrain.tasks.metrics import (
    area_under_roc,
    binary_metrics,
    confusion_counts,
    label_metrics,
    matthews_correlation,
    regression_metrics,
    regression_sums,
    score_counts,
    scores_of_labels,
)

sklearn = pytest.importorskip("sklearn.metrics")
IGNORED = -100
C = 5


def draw(seed: int, num: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Return labels (some ignored; label 4 never occurs) and predictions that are right half of the time."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, C - 1, num)
    predicted = np.where(random.random(num) < 0.5, labels, random.integers(0, C - 1, num))
    labels[random.random(num) < 0.1] = IGNORED
    return torch.from_numpy(labels), torch.from_numpy(predicted)


def cut(function, num_parts: int, *tensors: torch.Tensor) -> np.ndarray:
    """Return the sum of what ``function`` says of each of ``num_parts`` parts, as ranks would add it up."""
    parts = zip(*(tensor.tensor_split(num_parts) for tensor in tensors), strict=True)
    return sum(function(*part).double().numpy() for part in parts)


@pytest.mark.parametrize("num_parts", [1, 3, 7])
def test_confusion(num_parts: int) -> None:
    labels, predicted = draw(0)
    confusion = cut(lambda p, y: confusion_counts(p, y, C, ignored=IGNORED), num_parts, predicted, labels)
    counted = labels != IGNORED
    y, p = labels[counted].numpy(), predicted[counted].numpy()
    assert (confusion == sklearn.confusion_matrix(y, p, labels=range(C))).all()
    found = label_metrics(confusion)
    assert found["accuracy"] == pytest.approx(sklearn.accuracy_score(y, p), abs=1e-12)
    assert found["mcc"] == pytest.approx(sklearn.matthews_corrcoef(y, p), abs=1e-12)
    precision, recall, f1, _ = sklearn.precision_recall_fscore_support(y, p, average="macro", zero_division=0)
    assert [found["precision"], found["recall"], found["f1"]] == pytest.approx([precision, recall, f1], abs=1e-12)
    each = sklearn.precision_recall_fscore_support(y, p, labels=range(C), zero_division=0)
    for name, values in zip(("precision", "recall", "f1"), each, strict=False):
        assert scores_of_labels(confusion)[name] == pytest.approx(values, abs=1e-12)


def test_a_mean_over_parts_is_another_metric() -> None:
    labels, predicted = draw(1)
    whole = label_metrics(confusion_counts(predicted, labels, C, ignored=IGNORED).numpy())["f1"]
    parts = [
        label_metrics(confusion_counts(p, y, C, ignored=IGNORED).numpy())["f1"]
        for p, y in zip(predicted.tensor_split(7), labels.tensor_split(7), strict=True)
    ]
    assert abs(np.mean(parts) - whole) > 1e-3


def test_only_one_label() -> None:
    confusion = np.diag([7.0, 0.0])
    assert label_metrics(confusion) == {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "mcc": 0}
    assert matthews_correlation(confusion) == sklearn.matthews_corrcoef([0] * 7, [0] * 7)


@pytest.mark.parametrize("num_parts", [1, 3, 7])
def test_area_under_roc(num_parts: int) -> None:
    random = np.random.default_rng(2)
    y = random.random(500) < 0.3
    # bf16 already, with ties and both signs
    scores = torch.from_numpy(np.round(random.normal(size=500) + y, 1)).bfloat16().float()
    counted = torch.from_numpy(random.random(500) < 0.9)
    counts = cut(score_counts, num_parts, scores, torch.from_numpy(y), counted)
    right = sklearn.roc_auc_score(y[counted], scores[counted].numpy())
    assert area_under_roc(counts) == pytest.approx(right, abs=1e-12)
    assert np.isnan(area_under_roc(np.zeros((2, 4))))


def test_several_labels_a_sample() -> None:
    random = np.random.default_rng(3)
    y, p = random.random((200, C)) < 0.4, random.random((200, C)) < 0.5
    counts = np.stack([(y & p).sum(0), (~y & p).sum(0), (y & ~p).sum(0), (~y & ~p).sum(0)]).astype(float)
    found = binary_metrics(counts)
    for average, name in [("micro", "f1"), ("macro", "f1_macro")]:
        assert found[name] == pytest.approx(sklearn.f1_score(y, p, average=average), abs=1e-12)
    assert found["precision"] == pytest.approx(sklearn.precision_score(y, p, average="micro"), abs=1e-12)
    assert found["recall"] == pytest.approx(sklearn.recall_score(y, p, average="micro"), abs=1e-12)


@pytest.mark.parametrize("num_parts", [1, 3, 7])
def test_regression(num_parts: int) -> None:
    random = np.random.default_rng(4)
    values = torch.from_numpy(random.normal(3, 2, 300))
    predicted = values + torch.from_numpy(random.normal(0, 0.5, 300))
    counted = torch.from_numpy(random.random(300) < 0.9)
    found = regression_metrics(cut(regression_sums, num_parts, predicted, values, counted))
    y, p = values[counted].numpy(), predicted[counted].numpy()
    assert found["mae"] == pytest.approx(sklearn.mean_absolute_error(y, p), rel=1e-6)
    assert found["rmse"] == pytest.approx(sklearn.root_mean_squared_error(y, p), rel=1e-6)
    assert found["r2"] == pytest.approx(sklearn.r2_score(y, p), rel=1e-5)
