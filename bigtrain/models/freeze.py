"""Which parameters ``model.freeze`` keeps from being trained."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from bigtrain.errors import ConfigError, some


def frozen_names(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the parameters that ``patterns`` freeze, which match names as they are in the model itself.

    Raises:
        ConfigError: a pattern matches none, or all parameters are frozen.
    """
    own = {name: name.removeprefix("causal_lm.") for name in names}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in own.values()):
            raise ConfigError(
                f"model.freeze: {pattern!r} matches no parameter of this model, which has {some(list(own.values()), 8)}"
            )
    frozen = [name for name, bare in own.items() if any(fnmatchcase(bare, pattern) for pattern in patterns)]
    if own and len(frozen) == len(own):
        raise ConfigError("model.freeze: all parameters are frozen, so nothing would be trained; name fewer")
    return frozen


def with_frozen(build_model: Callable[[], nn.Module], patterns: Sequence[str]) -> Callable[[], nn.Module]:
    """Return a builder of the same model, of which the parameters that ``patterns`` name need no gradient."""

    def build() -> nn.Module:
        model = build_model()
        for name in frozen_names((name for name, _ in model.named_parameters()), patterns):
            model.get_parameter(name).requires_grad_(False)
        return model

    return build
