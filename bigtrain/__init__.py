"""bigtrain: the same training run, anywhere. ``bigtrain.train("+model=gpt_nano", "train.steps=20")``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bigtrain.cli.api import Run, generate, load_run, predict, train, validate

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "generate", "load_run", "predict", "train", "validate"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bigtrain' has no attribute {name!r}")
    from bigtrain.cli import api  # torch and hydra: only who uses one of these waits for them

    return getattr(api, name)
