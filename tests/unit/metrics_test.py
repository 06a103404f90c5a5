"""Metrics made of sums are those of scikit-learn on all predictions at once, however the sums were cut."""

import numpy as np
import pytest
import torch

from bigtrain.config import Inputs
from bigtrain.tasks.base import split_sums
from bigtrain.tasks.classification import Classification
from bigtrain.tasks.metrics import (
    area_under_roc,
    confusion_counts,
    label_metrics,
    matthews_correlation,
    regression_metrics,
    regression_sums,
    score_counts,
    scores_by_label,
)
from bigtrain.tasks.multi_label import MultiLabel

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
        assert scores_by_label({"confusion": confusion})[name] == pytest.approx(values, abs=1e-12)


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


class Given(torch.nn.Module):
    """A network whose logits are its inputs."""

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


def total(objective, num_parts: int, logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, dict[str, np.ndarray]]:
    """Return loss and sums of an objective in evaluation, added up over parts, the loss over what counts."""
    network = Given().eval()
    sums = cut(lambda x, y: objective(network, x, y), num_parts, logits, labels)
    num_targets = objective.count({"labels": labels.numpy()}).sum()
    return sums[0] / num_targets, split_sums(objective, sums[1:], held_out=True)


@pytest.mark.parametrize("num_parts", [1, 3, 7])
def test_several_labels_a_sample(num_parts: int) -> None:
    random = np.random.default_rng(3)
    y = random.random((200, C)) < 0.4
    # bf16 already, with ties
    logits = torch.from_numpy(np.round(random.normal(size=(200, C)) + y - 0.5, 1)).bfloat16().float()
    p, weights = logits.numpy() > 0, (2.0, 1.0, 0.5, 3.0, 1.0)
    objective = MultiLabel(inputs=Inputs.features, num_labels=C, class_weights=weights)
    labels = torch.from_numpy(y.astype(np.int64))
    loss, sums = total(objective, num_parts, logits, labels)
    right = torch.nn.functional.binary_cross_entropy_with_logits(
        logits.double(), labels.double(), pos_weight=torch.tensor(weights, dtype=torch.float64)
    )
    assert loss == pytest.approx(float(right), rel=1e-6)
    found = objective.metrics(loss, sums)
    for average, end in [("micro", ""), ("macro", "_macro")]:
        for name in ("precision", "recall", "f1"):
            expected = getattr(sklearn, f"{name}_score")(y, p, average=average, zero_division=0)
            assert found[f"{name}{end}"] == pytest.approx(expected, abs=1e-12)
    assert found["exact"] == pytest.approx(sklearn.accuracy_score(y, p), abs=1e-12)
    assert found["accuracy"] == pytest.approx((y == p).mean(), abs=1e-12)
    assert found["auc"] == pytest.approx(sklearn.roc_auc_score(y, logits.numpy(), average="macro"), abs=1e-12)
    each = scores_by_label(sums)
    assert each["f1"] == pytest.approx(sklearn.f1_score(y, p, average=None), abs=1e-12)
    assert each["auc"] == pytest.approx(sklearn.roc_auc_score(y, logits.numpy(), average=None), abs=1e-12)


def test_labels_of_several_that_are_not_known_do_not_count() -> None:
    random = np.random.default_rng(4)
    labels, logits = torch.from_numpy(random.integers(0, 2, (60, C))), torch.from_numpy(random.normal(size=(60, C)))
    objective = MultiLabel(inputs=Inputs.features, num_labels=C)
    hidden = torch.where(torch.arange(60)[:, None] < 20, IGNORED, labels)
    (loss, sums), (right, known) = (
        total(objective, 1, logits.float()[i:], y[i:]) for i, y in ((0, hidden), (20, labels))
    )
    assert loss == pytest.approx(right, rel=1e-6)
    assert all((sums[name] == known[name]).all() for name in known)


@pytest.mark.parametrize("num_parts", [1, 3, 7])
def test_weighted_classes_and_the_auc_of_two(num_parts: int) -> None:
    random = np.random.default_rng(5)
    labels = torch.from_numpy(np.where(random.random(300) < 0.1, IGNORED, random.random(300) < 0.2))
    logits = torch.from_numpy(random.normal(size=(300, 2))).bfloat16().float()
    logits[:, 0] = 0
    objective = Classification(inputs=Inputs.features, num_labels=2, class_weights=(0.7, 2.5))
    loss, sums = total(objective, num_parts, logits, labels)
    right = torch.nn.functional.cross_entropy(
        logits.double(), labels, weight=torch.tensor([0.7, 2.5], dtype=torch.float64), ignore_index=IGNORED
    )
    assert loss == pytest.approx(float(right), rel=1e-6)
    counted = labels != IGNORED
    expected = sklearn.roc_auc_score(labels[counted].numpy(), logits[counted, 1].numpy())
    assert objective.metrics(loss, sums)["auc"] == pytest.approx(expected, abs=1e-12)
    # A mean of the means of parts would be another number.
    means = [total(objective, 1, x, y)[0] for x, y in zip(logits.split(30), labels.split(30), strict=True)]
    assert abs(np.mean(means) - loss) > 1e-4


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


def test_r2_of_values_far_from_zero_also_where_sums_are_fp32() -> None:
    random = np.random.default_rng(5)
    values = torch.from_numpy(2000 + random.normal(0, 1, 4096)).float()
    predicted = values + torch.from_numpy(random.normal(0, 0.5, 4096)).float()
    total = torch.zeros(2, 5)
    for part in zip(predicted.split(4), values.split(4), strict=True):
        total += regression_sums(*part, torch.ones(4, dtype=torch.bool))
    r2 = sklearn.r2_score(values.double().numpy(), predicted.double().numpy())
    assert regression_metrics(total.double().numpy())["r2"] == pytest.approx(r2, rel=1e-3)
    exact = cut(regression_sums, 1024, predicted, values, torch.ones(4096, dtype=torch.bool))
    assert regression_metrics(exact)["r2"] == pytest.approx(r2, rel=1e-5)
    variance = float((values**2).sum() - values.sum() ** 2 / 4096)  # of one fp32 sum each
    assert abs(1 - float(((values - predicted) ** 2).sum()) / variance - r2) > 0.1
