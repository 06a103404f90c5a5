"""The section ``model.moe``: a mixture of experts in place of feed-forward layers."""

from dataclasses import dataclass
from typing import Annotated

from bigtrain.config.bounds import Bound
from bigtrain.config.choices import RouterScores


@dataclass(kw_only=True, slots=True)
class MoeConfig:
    """Experts of which each token visits some, in place of the feed-forward layer of a block."""

    num_experts: Annotated[int, Bound(ge=2, le=10_000)]
    """Experts of a block that a router chooses from."""
    experts_per_token: Annotated[int, Bound(ge=1)] = 2
    """Experts that each token visits; none is ever full, so no token is dropped."""
    expert_dim: Annotated[int, Bound(ge=1)]
    """Inner width of an expert."""
    num_shared_experts: Annotated[int, Bound(ge=0)] = 0
    """Experts besides, which all tokens visit: one layer so many times as wide."""
    dense_layers: Annotated[int, Bound(ge=0)] = 0
    """Blocks before the first mixture, with a feed-forward layer of ``model.ffn_dim``."""
    scores: RouterScores = RouterScores.softmax
    """What scores of experts are made by; those of the chosen ones are divided by their sum."""
    balance_speed: Annotated[float, Bound(ge=0, le=1)] = 0.0
    """What is added, after each step, to the biases by which experts with too few tokens are preferred, 0.001 in DeepSeek-V3; no other program's Mixtral or Qwen3 has them."""
    sequence_balance: Annotated[float, Bound(ge=0, le=1)] = 0.001
    """Factor of a loss that keeps the experts of each sequence in balance."""
