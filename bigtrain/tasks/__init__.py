"""What a run minimises and measures, one module a task."""

from bigtrain.config import TaskConfig, TaskKind
from bigtrain.tasks.base import Objective
from bigtrain.tasks.causal_lm import CausalLM

OBJECTIVES = {TaskKind.causal_lm: CausalLM}


def build_objective(config: TaskConfig) -> Objective:
    """Return the objective that ``config`` chooses."""
    return OBJECTIVES[config.kind]()
