"""Rotary positions (Su et al. 2021, eq. 15), and how their frequencies are scaled for longer contexts.

Shape suffixes: B batch, T tokens, X heads, K head width.
"""

import math

import torch
from torch import Tensor

from bigtrain.config import ModelConfig, RopeKind, RopeScalingConfig

FAST_TURNS, SLOW_TURNS = 32, 1  # of YaRN: turns in the original context from which on, and up to which, channels count


def rope_table(config: ModelConfig, positions: Tensor) -> Tensor:
    """Return cosines and sines of the angles of positions ``(..., T)``, side by side, fp32 ``(..., T, K)``."""
    angles = positions[..., None].float() * rope_frequencies(config, positions.device)
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind is RopeKind.yarn:  # softens attention: queries and keys are both longer
        table = table * (0.1 * math.log(scaling.factor) + 1)
    return table


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Return the angle per position of each pair of channels, fp32 ``(K / 2,)``, scaled as the configuration says."""
    head_dim = config.head_dim or config.hidden_dim // config.num_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind is RopeKind.linear:
        return frequencies / scaling.factor
    if scaling.kind is RopeKind.yarn:
        kept = _kept_by_yarn(scaling, head_dim, config.rope_theta, device)
    else:
        periods = scaling.original_max_positions * frequencies / (2 * math.pi)
        kept = (periods - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = kept.clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _kept_by_yarn(scaling: RopeScalingConfig, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Return how far each pair of channels keeps its frequency, ``(K / 2,)`` (Peng et al. 2023, section 3.2).

    Linear between the channels that turn :data:`FAST_TURNS` and :data:`SLOW_TURNS` times in the original context, which
    are rounded outwards as in the authors' code and in transformers.
    """

    def channel(turns: float) -> float:
        return head_dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(channel(FAST_TURNS)), 0), min(math.ceil(channel(SLOW_TURNS)), head_dim - 1)
    channels = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    return 1 - ((channels - low) / max(high - low, 0.001)).clamp(0, 1)


def rotate(x_BTXK: Tensor, rope: Tensor) -> Tensor:
    """Rotate the channel pairs ``(i, i + K / 2)`` of every head, in fp32, by :func:`rope_table`'s angles."""
    cos, sin = rope.unsqueeze(-2).chunk(2, dim=-1)
    first, second = x_BTXK.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x_BTXK.dtype)
