"""Which parameters are kept from being trained: by ``model.freeze``, or because adapters are trained instead."""

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from bigtrain.config import ModelConfig
from bigtrain.errors import ConfigError
from bigtrain.models.adapters import bare, is_of_adapter, matching, plain_name
from bigtrain.models.hf.heads import HEADS


def frozen_names(names: Iterable[str], model: ModelConfig) -> list[str]:
    """Return the parameters that are frozen by patterns of their names; ConfigError if one matches none, or all are."""
    own = {name: bare(name) for name in names}
    frozen = set(matching(own, model.freeze, "model.freeze", "parameter"))
    if model.adapter:
        trained = set(matching(own, model.adapter.also_train, "model.adapter.also_train", "parameter"))
        if HEADS[model.head].is_fresh:
            trained |= _of_head(own)
        frozen |= {name for name in own if not is_of_adapter(name)} - trained
    if own and len(frozen) == len(own):
        raise ConfigError("model.freeze: all parameters are frozen, so nothing would be trained; name fewer")
    return [name for name in own if name in frozen]


def _of_head(own: Mapping[str, str]) -> set[str]:
    """Return the parameters that may be fresh: those beside the trunk, the module with the most of them, and its pooler."""
    first = {name: bare.partition(".")[0] for name, bare in own.items()}
    trunk, _ = Counter(first.values()).most_common(1)[0]
    return {name for name, module in first.items() if module != trunk or ".pooler." in name}


def freeze(model: nn.Module, config: ModelConfig) -> None:
    """Let the frozen parameters of a model need no gradient."""
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    for name in frozen_names(parameters, config):
        parameters[name].requires_grad_(False)
