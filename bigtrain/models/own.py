"""A network of the user's own: built without memory, with initial values that every rank computes alike."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bigtrain.config import ModelConfig, parts
from bigtrain.config.convert import from_dict
from bigtrain.errors import ConfigError
from bigtrain.models.construction import parameters_on_meta, refuse_batch_statistics
from bigtrain.models.init import Given, InitialValue
from bigtrain.models.programs import Program, Recorder, built_whole, seeded
from bigtrain.models.small import NETWORKS

KEPT_ELEMENTS = 2**22  # larger parameters made with values (``nn.Parameter(torch.ones(8))``) are not kept


def build_own(config: ModelConfig) -> nn.Module:
    """Build an own part: its ``build()``, or a call; ConfigError: it is no module, or has batch statistics."""
    build = _builder(config)
    with parameters_on_meta() if torch.empty(0).is_meta else contextlib.nullcontext():
        network: Any = build()
    where = f"model.name={config.name}"
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{where}: it builds a {type(network).__name__}; it must return an nn.Module")
    refuse_batch_statistics(network, f"{where}: ", "use GroupNorm or LayerNorm")
    return network


def _builder(config: ModelConfig) -> Callable[[], nn.Module]:
    if config.name in NETWORKS:
        return from_dict(NETWORKS[config.name], config.settings, section="model.settings.").build
    part, where = parts.build(str(config.name), config.settings, setting="model.name"), f"model.name={config.name}"
    build = getattr(part, "build", part)
    if isinstance(part, nn.Module):
        raise ConfigError(
            f"{where}: a module that is built already; give a function that builds it, so that its weights follow from "
            "train.seed on every rank"
        )
    if not callable(build):
        raise ConfigError(f"{where}: a model is a function, or a dataclass with build()")
    return build


class Uncached(nn.Module):
    """An own network that returns logits for tokens, as text is generated from it: all tokens are computed each time."""

    def __init__(self, network: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.network = network
        self.vocab_size = config.vocab_size
        self.max_positions = config.settings.get("max_positions")

    def new_cache(self, capacity_tokens: int) -> None:
        """Return nothing: there is no cache."""

    def forward(self, tokens_BT: Tensor, *, cache: None = None) -> Tensor:
        return self.network(tokens_BT)


def own_values(model: nn.Module, config: ModelConfig, seed: int) -> dict[str, InitialValue]:
    """Return what the network's own code gives to each parameter, with random numbers that depend on ``seed`` alone.

    What torch's functions fill in place is recorded and played back part by part (:mod:`bigtrain.models.programs`).
    Small parameters that are made with their values are kept. For anything else the network is built once more with
    memory.
    """
    build = _builder(config)
    recorder = Recorder()
    with seeded(seed), parameters_on_meta(keep_elements=KEPT_ELEMENTS) as held, recorder:
        drawn = build()
    values: dict[str, InitialValue | None] = {}
    for name, parameter in drawn.named_parameters():
        constructed = held.get(parameter)
        if steps := recorder.of(parameter):
            values[name] = Program(steps, seed, name)
        elif recorder.has_seen(parameter) or constructed is None or constructed.isnan().any():
            values[name] = None
        else:
            values[name] = Given(constructed.float())
    if unknown := [name for name, value in values.items() if value is None]:
        values |= built_whole(build, unknown, seed, f"model.name={config.name}: its code")
    return {name: values[name] for name, _ in model.named_parameters()}
