"""A mixture of experts: a router sends each token through some of many feed-forward networks.

No expert is ever full, and what is chosen depends on the token alone, so no result depends on how a batch was cut.
Experts are kept in balance by a loss per sequence (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20; for mixtures without
groups that of Switch Transformers, Fedus et al. 2022, of one sequence) and by biases of the choice, without an influence
on the output (Wang et al. 2024, arXiv 2408.15664). A loss per micro-batch, or a capacity, would change with the layout.

Shape suffixes: B sequences, T tokens, N = B * T, D hidden width, E experts, K experts of a token, F inner width.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtrain.config import RouterScores
from bigtrain.config.moe import MoeConfig
from bigtrain.models.exchange import ALL_EXPERTS, ALONE

BALANCE = ".router.balance"  # ends the names of the biases in a network


class Router(nn.Module):
    """Chooses the experts of each token; after the step an engine moves ``balance`` by ``counts``."""

    balance: Tensor  # fp32 (E,): added to scores for the choice alone
    counts: (
        Tensor  # int64 (E,): tokens that chose each expert in the backward passes of this step, of this rank's samples
    )
    exchange = ALONE  # with the ranks that have the other tokens of its sequences

    def __init__(self, hidden_dim: int, moe: MoeConfig):
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.num_experts, hidden_dim))
        self.register_buffer("balance", torch.zeros(moe.num_experts, device="cpu"))
        self.register_buffer("counts", torch.zeros(moe.num_experts, dtype=torch.int64, device="cpu"), persistent=False)
        self.loss_scale: Tensor | float = 0.0  # of a target's loss in the backward pass, set by the engine

    def forward(self, x_BTD: Tensor, num_targets_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the chosen experts ``(N, K)`` and their fp32 weights; ``num_targets_B`` counts those of each sequence."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            logits_BTE = F.linear(x_BTD.float(), self.weight.float())
        is_softmax = self.moe.scores is RouterScores.softmax
        scores_BTE = logits_BTE.softmax(-1) if is_softmax else logits_BTE.sigmoid()
        chosen_BTK = (scores_BTE.detach() + self.balance).topk(self.moe.experts_per_token).indices
        if num_targets_B is not None and scores_BTE.requires_grad:
            shares_BTE = scores_BTE if is_softmax else scores_BTE / scores_BTE.sum(-1, keepdim=True)
            scores_BTE = _Balanced.apply(scores_BTE, shares_BTE, chosen_BTK, num_targets_B, self)
        weights_BTK = scores_BTE.gather(-1, chosen_BTK)
        weights_BTK = weights_BTK / weights_BTK.sum(-1, keepdim=True)
        return chosen_BTK.flatten(0, 1), weights_BTK.flatten(0, 1)


class _Balanced(torch.autograd.Function):
    """Returns ``scores``; the backward pass counts tokens and adds the gradient of the loss per sequence.

    There, because activation checkpointing runs a forward pass twice and a backward pass once, and because a pipeline
    has the loss on its last stage only.
    """

    @staticmethod
    def forward(
        ctx: Any, scores_BTE: Tensor, shares_BTE: Tensor, chosen_BTK: Tensor, num_targets_B: Tensor, router: Router
    ) -> Tensor:
        chosen_BE = scores_BTE.new_zeros(len(scores_BTE), scores_BTE.shape[-1], dtype=torch.int64)
        chosen_BE.scatter_add_(1, chosen_BTK.flatten(1), torch.ones_like(chosen_BTK.flatten(1)))
        ctx.save_for_backward(router.exchange.total(chosen_BE), num_targets_B)
        ctx.router, ctx.num_tokens = router, chosen_BTK.shape[1] * router.exchange.size
        return scores_BTE.view_as(scores_BTE)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (chosen_BE, num_targets_B), router, (gradient_BTE,) = ctx.saved_tensors, ctx.router, gradients
        router.counts += (chosen_BE * (num_targets_B > 0)[:, None]).sum(0)  # sequences without a target are padding
        if not router.moe.sequence_balance:
            return gradient_BTE, None, None, None, None
        # sum over e of f_e * P_e: P is the mean share of tokens, f the part of choices that are e, by the number of e
        frequencies_BE = chosen_BE * (router.moe.num_experts / (router.moe.experts_per_token * ctx.num_tokens))
        factor_B = num_targets_B * (router.moe.sequence_balance / ctx.num_tokens) * router.loss_scale
        of_shares_BTE = (frequencies_BE * factor_B[:, None])[:, None].expand_as(gradient_BTE)
        return gradient_BTE, of_shares_BTE.to(gradient_BTE.dtype), None, None, None


class Experts(nn.Module):
    """SwiGLU networks of one shape, computed by grouped products."""

    def __init__(self, num_experts: int, hidden_dim: int, expert_dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(num_experts, expert_dim, hidden_dim))
        self.up = nn.Parameter(torch.empty(num_experts, expert_dim, hidden_dim))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_dim, expert_dim))

    def forward(self, rows: Tensor, counts_E: Tensor) -> Tensor:
        """Return the output for ``rows (num_rows, D)``, the first ``counts_E[0]`` of which are of the first expert."""
        device_type = rows.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else rows.dtype
        ends_E = counts_E.cumsum(0).to(torch.int32)

        def product(x: Tensor, weight: Tensor) -> Tensor:
            return F.grouped_mm(x, weight.to(dtype).transpose(1, 2), offs=ends_E)

        rows = rows.to(dtype)
        return product(F.silu(product(rows, self.gate)) * product(rows, self.up), self.down)


class MixtureOfExperts(nn.Module):
    """In place of a feed-forward layer; ``shared`` is a module that all tokens visit, if there is one."""

    exchange = ALL_EXPERTS

    def __init__(self, hidden_dim: int, moe: MoeConfig, dropout: float, shared: nn.Module | None):
        super().__init__()
        self.router = Router(hidden_dim, moe)
        self.experts = Experts(moe.num_experts, hidden_dim, moe.expert_dim)
        self.shared = shared
        self.dropout = dropout

    def forward(self, x_BTD: Tensor, num_targets_B: Tensor | None = None) -> Tensor:
        """Return ``(B, T, D)``; ``num_targets_B`` counts the targets of each sequence in training."""
        chosen_NK, weights_NK = self.router(x_BTD, num_targets_B)
        num_chosen = chosen_NK.shape[1]
        flat = chosen_NK.flatten()
        order = flat.argsort(stable=True)
        counts_E = torch.zeros(len(self.router.balance), dtype=torch.int64, device=flat.device)
        counts_E.scatter_add_(0, flat, torch.ones_like(flat))
        rows, own_counts, way = self.exchange.to_experts(x_BTD.flatten(0, 1)[order // num_chosen], counts_E)
        rows = self.exchange.back(self.experts(rows, own_counts), way)
        of_tokens = torch.empty_like(rows).index_copy(0, order, rows).unflatten(0, (-1, num_chosen))
        y_BTD = (of_tokens * weights_NK[..., None].to(rows.dtype)).sum(1).view_as(x_BTD)  # a token's, in its order
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD)
        return F.dropout(y_BTD, self.dropout, self.training)


def routers(network: nn.Module) -> Iterator[tuple[str, Router]]:
    """Yield name and router of each mixture."""
    return ((name, module) for name, module in network.named_modules() if isinstance(module, Router))


def balances(network: nn.Module) -> dict[str, Tensor]:
    """Return the biases of all routers by name, which belong to the weights though no optimizer knows of them."""
    return {f"{name}.balance": router.balance for name, router in routers(network)}
