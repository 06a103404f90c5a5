"""The section ``privacy``, and what cannot be private."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from bigtrain.config.bounds import Bound, OnlyIf
from bigtrain.config.choices import EngineKind, PreferenceLoss, TaskKind
from bigtrain.config.parallel import shared

if TYPE_CHECKING:
    from bigtrain.config import TrainConfig


@dataclass(kw_only=True, slots=True)
class PrivacyConfig:
    """Differential privacy of samples (DP-SGD): their gradients are clipped one by one, and noise is added to the sum."""

    max_grad_norm: Annotated[float | None, Bound(gt=0)] = None
    """Largest norm of the gradient of one sample; makes a run private, under ``ddp``."""
    noise_multiplier: Annotated[float, Bound(ge=0), OnlyIf("max_grad_norm", not_in=(None,))] = 1.0
    """Standard deviation of the noise by ``max_grad_norm``; 0 gives no privacy."""
    delta: Annotated[float, Bound(gt=0, lt=1), OnlyIf("max_grad_norm", not_in=(None,))] = 1e-5
    """Probability with which epsilon does not hold; less than 1 / samples."""
    max_epsilon: Annotated[float | None, Bound(gt=0), OnlyIf("max_grad_norm", not_in=(None,))] = None
    """A run whose steps would spend more is refused before it begins."""


def check_privacy(config: "TrainConfig") -> Iterator[str]:
    """Yield what a private run cannot be combined with."""
    task, where = config.task, "privacy.max_grad_norm"
    if config.privacy.max_grad_norm is None:
        if config.privacy != PrivacyConfig():
            yield f"{where}: missing, and without it nothing is private; set it, or leave privacy.* out"
        return
    if config.data.allow_change:
        yield f"{where}: of other samples there is no account; leave data.allow_change out"
    if config.engine.kind is not EngineKind.ddp:
        instead = "only engine=ddp has the whole gradient of a sample; use that"
        yield f"{where}: engine={config.engine.kind.name} sums gradients as they come, and {instead}"
    if task.kind == TaskKind.contrastive or (task.kind == TaskKind.preference and task.loss is PreferenceLoss.kto):
        yield f"{where}: the loss of a sample depends on others with task={task.kind}; nothing bounds what one of them does"
    for setting in shared(config.parallel):
        yield f"{where}: a rank has to have the whole gradient of a sample; leave {setting.partition('=')[0]} out"
    if config.model.moe is not None:
        yield f"{where}: the balance of experts follows from the tokens of all samples; leave model.moe out"
    if task.class_weights is not None:
        yield f"{where}: every sample weighs the same; leave task.class_weights out"
    if config.data.augment.mixup:
        yield f"{where}: data.augment.mixup blends a sample with another; leave it out"
    if config.data.mixture or config.data.on_the_fly:
        yield f"{where}: how often a sample is drawn has to be known; use one prepared data set, without data.mixture"
    if config.bad_numbers.max_rollbacks:
        noise = "a step that is done again with other samples would have the same noise"
        yield f"{where}: {noise}; add bad_numbers.max_rollbacks=0"
