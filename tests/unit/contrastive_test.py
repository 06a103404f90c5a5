"""The loss of pairs among all pairs of a step is the same however the step is cut, and so is its gradient."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bigtrain.data.read.batch import Batch
from bigtrain.run.step import coupled
from bigtrain.tasks.base import IGNORE_INDEX, TaskModel
from bigtrain.tasks.contrastive import Contrastive

N, S, T, V = 12, 7, 5, 50


class Bag(nn.Module):
    """Means of the vectors of a text's tokens, with dropout."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.vectors, self.dropout = nn.Embedding(V, 8), nn.Dropout(dropout)

    def forward(self, tokens, lengths):
        is_token = torch.arange(tokens.shape[1]) < lengths[:, None]
        return (self.dropout(self.vectors(tokens)) * is_token[:, :, None]).sum(dim=1) / lengths[:, None]


def pairs():
    random = np.random.default_rng(1)
    targets = random.integers(0, V, (N, T))
    targets[np.arange(T) >= random.integers(1, T + 1, N)[:, None]] = IGNORE_INDEX
    targets[4] = IGNORE_INDEX  # padding
    columns = {"source": random.integers(0, V, (N, S)), "source_lengths": random.integers(1, S + 1, N)}
    columns |= {"tokens": np.zeros((N, T), dtype=np.int64), "targets": targets}
    return Batch({name: torch.from_numpy(column) for name, column in columns.items()})


def two_passes(objective, size, *, dropout=0.0):
    """Return sums and gradient of a step in micro-batches of ``size``, as an engine computes them."""
    module = TaskModel(Bag(dropout), objective)
    mesh = SimpleNamespace(dp_rank=0, dp_size=1, total=lambda tensor: tensor)
    engine = SimpleNamespace(objective=objective, module=module, mesh=mesh, device=torch.device("cpu"))
    total = 0
    for batch in coupled(engine, pairs().split(size), trains=True):
        sums = module(*batch.values())
        sums[0].backward()
        total = total + sums.detach()
    return total, module.network.vectors.weight.grad


@pytest.mark.parametrize("is_symmetric", [False, True])
def test_any_cut_has_the_loss_and_the_gradient_of_the_whole(is_symmetric):
    objective, network = Contrastive(is_symmetric=is_symmetric), Bag()
    right = objective(network, *pairs().values())
    right[0].backward()
    assert right[3] == N - 1 and torch.isfinite(network.vectors.weight.grad).all()
    for size in (1, 3, 12):
        sums, gradient = two_passes(objective, size)
        torch.testing.assert_close(sums, right.detach())
        torch.testing.assert_close(gradient, network.vectors.weight.grad)
    alone = sum(objective(network, *batch.values())[0] for batch in pairs().split(3))
    assert abs(alone - right[0]) > 1, "with negatives of its micro-batch alone it would be another loss"


def test_the_loss_is_that_of_all_cosines():
    objective, network, batch = Contrastive(temperature=0.1), Bag(), pairs()
    source, target = objective.embed(network, *batch.values())[:, [i for i in range(N) if i != 4]].detach()
    cosines = torch.cosine_similarity(source[:, None], target[None], dim=-1) / 0.1
    sums = objective(network, *batch.values())
    right = -cosines.log_softmax(dim=1).diagonal().sum()
    torch.testing.assert_close(sums[0].detach(), right)
    ranks = [sorted(row, reverse=True).index(row[i]) + 1 for i, row in enumerate(cosines.tolist())]
    metrics = objective.metrics(0.0, dict(zip(objective.sums, sums[1:].detach().numpy(), strict=True)))
    assert metrics["recall_at_1"] == pytest.approx(np.mean([rank == 1 for rank in ranks]))
    assert metrics["mean_reciprocal_rank"] == pytest.approx(np.mean([1 / rank for rank in ranks]))


def test_both_passes_draw_the_same_dropout():
    whole = two_passes(Contrastive(), N, dropout=0.5)
    module = TaskModel(Bag(0.5), Contrastive())
    module(*pairs().values())[0].backward()  # one pass, with the numbers that the second one drew
    torch.testing.assert_close(whole[1], module.network.vectors.weight.grad)
