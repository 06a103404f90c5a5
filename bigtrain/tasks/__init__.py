"""What a run minimises and measures, one module a task."""

from bigtrain.config import TaskConfig, TaskKind, parts
from bigtrain.errors import ConfigError
from bigtrain.tasks.base import Objective
from bigtrain.tasks.causal_lm import CausalLM

OBJECTIVES = {TaskKind.causal_lm.name: CausalLM}


def build_objective(config: TaskConfig) -> Objective:
    """Return the objective that ``config`` chooses.

    Raises:
        ConfigError: nothing imported has it, or it is none.
    """
    if config.kind in OBJECTIVES:
        return OBJECTIVES[config.kind]()
    objective = parts.instance(config.kind, config.settings, setting="task.kind")
    needed = ("fields", "sums", "count", "counts_by_shape", "metrics")
    missing = [name for name in needed if not hasattr(objective, name)]
    missing += [name for name in ("count", "__call__") if getattr(type(objective), name, None) is vars(Objective)[name]]
    if missing or not callable(objective):
        raise ConfigError(
            f"task.kind={config.kind}: it has no {', '.join(missing) or '__call__'}; an objective has what "
            "bigtrain.tasks.base.Objective lists"
        )
    return objective
