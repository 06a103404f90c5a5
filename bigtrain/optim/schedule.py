"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from bigtrain.config import SchedulerConfig, SchedulerKind


def lr_at(step: int, *, peak_lr: float, num_steps: int, config: SchedulerConfig) -> float:
    """Return the learning rate of optimizer step ``step``.

    Args:
        step: 0-based optimizer step.
        peak_lr: learning rate after warm-up.
        num_steps: optimizer steps of the whole run.
        config: shape. Warm-up is linear, and its first step already has a rate above 0.

    Cosine: Loshchilov & Hutter, arXiv 1608.03983. WSD (warm-up, stable, decay): Hu et al., arXiv 2404.06395.
    """
    if step < config.warmup_steps:
        return peak_lr * (step + 1) / config.warmup_steps
    return peak_lr * _decay(step, num_steps, config)


def _decay(step: int, num_steps: int, config: SchedulerConfig) -> float:
    """Return the share of the peak rate after warm-up; ``min_lr_ratio`` is reached at the last step."""
    if config.kind is SchedulerKind.constant:
        return 1.0
    first = config.warmup_steps
    if config.kind is SchedulerKind.wsd:
        first = max(first, num_steps - round(config.decay_fraction * num_steps))
    progress = min(max((step - first + 1) / max(num_steps - first, 1), 0.0), 1.0)
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind is SchedulerKind.cosine else 1 - progress
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * falling
