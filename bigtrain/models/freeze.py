"""Which parameters are kept from being trained: by ``model.freeze``, or because adapters are trained instead."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from bigtrain.config import ModelConfig
from bigtrain.errors import ConfigError, some
from bigtrain.models.adapters import bare, is_of_adapter, plain_name
from bigtrain.models.hf.heads import HEADS


def frozen_names(names: Iterable[str], model: ModelConfig) -> list[str]:
    """Return the parameters that are frozen by patterns of their names; ConfigError if one matches none, or all are."""
    own = {name: bare(name) for name in names}
    frozen = set(_matching(own, model.freeze, "model.freeze"))
    if model.adapter:
        trained = set(_matching(own, model.adapter.also_train, "model.adapter.also_train"))
        if HEADS[model.head].is_fresh:
            trained |= _of_head(own)
        frozen |= {name for name in own if not is_of_adapter(name)} - trained
    if own and len(frozen) == len(own):
        raise ConfigError("model.freeze: all parameters are frozen, so nothing would be trained; name fewer")
    return [name for name in own if name in frozen]


def _matching(own: Mapping[str, str], patterns: Sequence[str], setting: str) -> list[str]:
    for pattern in patterns:
        if not any(fnmatchcase(bare, pattern) for bare in own.values()):
            raise ConfigError(
                f"{setting}: {pattern!r} matches no parameter of this model, which has {some(list(own.values()), 8)}"
            )
    return [name for name, bare in own.items() if any(fnmatchcase(bare, pattern) for pattern in patterns)]


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
