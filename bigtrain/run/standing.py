"""Which validation of a run is its best one, and when training on is of no use."""

import numpy as np

from bigtrain.checkpoint.store import RunState, Standing
from bigtrain.config import TrainConfig, ValidationConfig, own_sets
from bigtrain.errors import ConfigError
from bigtrain.run.written import WRITTEN_METRICS
from bigtrain.tasks import build_objective
from bigtrain.tasks.causal_lm import CausalLM
from bigtrain.tasks.metrics import LESS_IS_BETTER

EARLY_STOPPING = "early_stopping"


def begin_standing(config: TrainConfig, state: RunState | None) -> Standing:
    """Return the standing that a launch begins with: that of the checkpoint, unless it is by another metric.

    Raises:
        ConfigError: the task has no such metric.
    """
    objective, metric = build_objective(config.task), config.validation.metric
    known = ["loss"]
    if metric not in known:
        ones = {name: np.ones(shape) for name, shape in objective.sums.items()}
        known += objective.metrics(1.0, ones)
        known += ["bits_per_byte"] if isinstance(objective, CausalLM) else []
        known += WRITTEN_METRICS if config.validation.written_samples else ()
        known += [f"{name}/{other}" for name in own_sets(config.data, "validation") if name for other in known]
    if metric not in known:
        raise ConfigError(f"validation.metric={metric}: task={config.task.kind} has {', '.join(known)}")
    if state and state.standing and state.standing.metric == metric:
        return state.standing
    return Standing(
        metric,
        less_is_better=metric.rpartition("/")[2] in LESS_IS_BETTER | set(getattr(objective, "less_is_better", ())),
    )


def why_ended(standing: Standing, config: ValidationConfig) -> str | None:
    """Return why a run with this standing is over before ``train.steps``, None if it is not."""
    if standing.best is None or not config.every_steps:
        return None
    if config.stop_at is not None and standing.order(standing.best) <= standing.order(config.stop_at):
        return f"reached {standing.metric} {standing.best:.6g}"
    return EARLY_STOPPING if config.patience is not None and standing.num_since >= config.patience else None


def explain_end(standing: Standing, reason: str) -> str:
    """Return ``reason`` with the best validation and the setting that decided."""
    if reason != EARLY_STOPPING:
        return f"{reason} (validation.stop_at)"
    best = f"{standing.metric} {standing.best:.6g} after step {standing.best_step}"
    return f"no validation was better than {best} in {standing.num_since} (validation.patience)"
