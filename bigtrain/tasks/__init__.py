"""What a run minimises and measures, one module a task."""

from functools import partial

from bigtrain.config import PreferenceLoss, TaskConfig, TaskKind, parts
from bigtrain.errors import ConfigError
from bigtrain.tasks.base import Objective
from bigtrain.tasks.causal_lm import CausalLM
from bigtrain.tasks.classification import Classification
from bigtrain.tasks.contrastive import Contrastive
from bigtrain.tasks.ctc import CTC
from bigtrain.tasks.distillation import Distillation
from bigtrain.tasks.gan import GAN
from bigtrain.tasks.kto import KTO
from bigtrain.tasks.masked_lm import MaskedLM
from bigtrain.tasks.multi_label import MultiLabel
from bigtrain.tasks.preference import Preference
from bigtrain.tasks.regression import Regression
from bigtrain.tasks.reward import Reward
from bigtrain.tasks.seq2seq import Seq2Seq
from bigtrain.tasks.token_classification import TokenClassification


def build_objective(config: TaskConfig) -> Objective:
    """Return the objective that ``config`` chooses; ConfigError if nothing imported has it, or it is none."""
    match config.kind:
        case TaskKind.causal_lm:
            return CausalLM()
        case TaskKind.masked_lm:
            return MaskedLM()
        case TaskKind.classification:
            kind = MultiLabel if config.multi_label else partial(Classification, group_by=config.group_by)
            # Balanced weights are known when the data is; until then every sample weighs 1.
            weights = config.class_weights if isinstance(config.class_weights, list) else ()
            return kind(
                inputs=config.inputs, num_labels=config.num_labels or 2, class_weights=tuple(map(float, weights))
            )
        case TaskKind.token_classification:
            return TokenClassification(num_labels=config.num_labels or 2)
        case TaskKind.seq2seq | TaskKind.denoise | TaskKind.speech:
            return Seq2Seq(hears=config.kind == TaskKind.speech)
        case TaskKind.preference if config.loss is PreferenceLoss.kto:
            return KTO(beta=config.beta, weights=(config.desirable_weight, config.undesirable_weight))
        case TaskKind.preference:
            return Preference(loss=config.loss, beta=config.beta, margin=config.margin)
        case TaskKind.reward:
            return Reward()
        case TaskKind.distillation:
            return Distillation(
                divergence=config.divergence, weight=config.teacher_weight, temperature=config.teacher_temperature
            )
        case TaskKind.contrastive:
            return Contrastive(temperature=config.temperature, is_symmetric=config.symmetric)
        case TaskKind.ctc:
            return CTC()
        case TaskKind.gan:
            return GAN()
        case TaskKind.regression:
            return Regression(inputs=config.inputs, num_values=config.num_values)
    objective = parts.instance(config.kind, config.settings, setting="task.kind")
    needed = ("fields", "sums", "count", "counts_by_shape", "metrics")
    missing = [name for name in needed if not hasattr(objective, name)]
    missing += [
        name
        for name in ("fields", "count", "__call__")
        if getattr(type(objective), name, None) is vars(Objective)[name]
    ]
    if missing or not callable(objective):
        raise ConfigError(
            f"task.kind={config.kind}: it has no {', '.join(missing) or '__call__'}; an objective has what "
            "bigtrain.tasks.base.Objective lists"
        )
    return objective
