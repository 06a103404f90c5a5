"""What a student learns of a teacher's most likely tokens."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bigtrain.config import Divergence, Scored, TaskConfig
from bigtrain.tasks import build_objective
from bigtrain.tasks.base import TaskModel, split_sums
from bigtrain.tasks.scoring import score

V = 11


class Table(nn.Module):
    """Logits of each token's successor."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.logits = nn.Parameter(3 * torch.randn(V, V))

    def forward(self, tokens, targets=None, positions=None):
        return self.logits[tokens]


def batch():
    torch.manual_seed(5)
    tokens, targets = torch.randint(0, V, (3, 7)), torch.randint(0, V, (3, 7))
    return {"tokens": tokens, "targets": targets.masked_fill(torch.rand(3, 7) < 0.3, -100)}


def of_teacher(top_k, dtype=torch.float32):
    model = TaskModel(Table(1), build_objective(TaskConfig()))
    return score(model, batch(), Scored.logits, top_k=top_k, dtype=dtype)


def loss(top_k, student=None, **task):
    objective = build_objective(TaskConfig(kind="distillation", **task))
    return objective, objective(student or Table(2), *batch().values(), *of_teacher(top_k).values())


@pytest.mark.parametrize(("divergence", "temperature"), list(itertools.product(Divergence, (1.0, 2.5))))
def test_of_all_tokens_it_is_hintons(divergence, temperature):
    settings = {"divergence": divergence, "teacher_temperature": temperature, "teacher_weight": 0.7}
    student = Table(2)
    objective, found = loss(V, student, **settings)
    counted, tokens = batch()["targets"] >= 0, batch()["tokens"]
    logits = [table.logits[tokens][counted] for table in (Table(1), student)]
    log_p, log_q = ((x / temperature).log_softmax(dim=-1) for x in logits)
    if divergence is Divergence.reverse:
        log_p, log_q = log_q, log_p
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum") * temperature**2
    cross_entropy = F.cross_entropy(logits[1], batch()["targets"][counted], reduction="sum")
    expected = 0.3 * cross_entropy + 0.7 * kl
    assert found[0].item() == pytest.approx(expected.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(expected, student.logits)
    found[0].backward()
    assert torch.allclose(student.logits.grad, gradient, atol=1e-5)
    metrics = objective.metrics(0.0, split_sums(objective, found[1:].tolist()))
    assert metrics["divergence"] == pytest.approx(kl.item() / counted.sum().item(), rel=1e-5)


@pytest.mark.parametrize("divergence", Divergence)
def test_the_rest_is_one_event_neither_dropped_nor_shared_out(divergence):
    whole = [loss(k, teacher_weight=1.0, divergence=divergence)[1][0].item() for k in (1, 3, 6, V)]
    assert whole == sorted(whole) and whole[0] > 0, "a divergence of fewer events is smaller"
    _, same = loss(3, Table(1), teacher_weight=1.0, divergence=divergence)
    assert same[0].item() == pytest.approx(0, abs=1e-5), "0 where teacher and student agree"
    # A student that has the right proportions among the teacher's tokens, but not their mass, is told so.
    shifted = Table(1)
    ids = of_teacher(3)["top_ids"]
    with torch.no_grad():
        for token, chosen in zip(batch()["tokens"].flatten(), ids.flatten(0, 1), strict=True):
            shifted.logits[token, chosen.long()] -= 0.1
    assert loss(3, shifted, teacher_weight=1.0, divergence=divergence)[1][0].item() > 1e-3


def test_columns_are_log_probabilities_with_that_of_all_others():
    found, half = of_teacher(4), of_teacher(4, torch.float16)
    log_p, counted = Table(1).logits[batch()["tokens"]].log_softmax(dim=-1), batch()["targets"] >= 0
    top = log_p.topk(4)
    assert torch.allclose(found["top_log_probabilities"][counted][:, :4], top.values[counted], atol=1e-5)
    assert torch.equal(found["top_ids"][counted].long(), top.indices[counted]) and found["top_ids"].dtype == torch.int32
    assert torch.allclose(found["top_log_probabilities"].exp().sum(dim=-1)[counted], torch.ones(int(counted.sum())))
    assert not found["top_log_probabilities"][~counted].any() and not found["top_ids"][~counted].any()
    assert half["top_log_probabilities"].dtype == torch.float16 and half["top_log_probabilities"].isfinite().all()
