"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from bigtrain.config import SchedulerConfig, SchedulerKind


def lr_at(step: int, *, peak_lr: float, num_steps: int, config: SchedulerConfig) -> float:
    """Return the learning rate of the 0-based optimizer step ``step`` of ``num_steps``.

    Warm-up to ``peak_lr`` is linear, and its first step already has a rate above 0; ``min_lr_ratio`` is reached at the
    last step. Cosine: Loshchilov & Hutter, arXiv 1608.03983. WSD (warm-up, stable, decay): Hu et al., arXiv 2404.06395.
    Inverse square root: Vaswani et al., arXiv 1706.03762, whose factors of width and warm-up are in ``peak_lr``.
    """
    if step < config.warmup_steps:
        return peak_lr * (step + 1) / config.warmup_steps
    if config.kind is SchedulerKind.constant:
        return peak_lr
    if config.kind is SchedulerKind.inverse_sqrt:
        return peak_lr * math.sqrt(max(config.warmup_steps, 1) / (step + 1))
    first = config.warmup_steps
    if config.kind is SchedulerKind.wsd:
        first = max(first, num_steps - round(config.decay_fraction * num_steps))
    progress = min(max((step - first + 1) / max(num_steps - first, 1), 0.0), 1.0)
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind is SchedulerKind.cosine else 1 - progress
    return peak_lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * falling)
