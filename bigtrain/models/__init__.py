"""Models: plain modules, independent of how they are spread over devices."""

import torch
from torch import nn

from bigtrain.config import ModelConfig, ModelKind
from bigtrain.models.adapters import add_adapters
from bigtrain.models.init import InitialValue, native_value
from bigtrain.models.moe import balances
from bigtrain.models.own import build_own, own_values
from bigtrain.models.transformer import Transformer


def build_model(config: ModelConfig) -> nn.Module:
    """Build the model of ``config`` on the current default device, with uninitialised fp32 parameters.

    Under ``torch.device("meta")`` buffers, which native models have not, are real and on the CPU. A language model
    returns logits for ``model(tokens_BT)`` and the summed loss for ``model(tokens_BT, targets_BT)``; it has ``blocks``,
    ``vocab_size`` and ``max_positions``.
    """
    network = _build(config)
    if config.adapter:
        add_adapters(network, config.adapter)
    return network


def _build(config: ModelConfig) -> nn.Module:
    if config.kind is ModelKind.native:
        return Transformer(config)
    if config.kind is ModelKind.own:
        return build_own(config)
    from bigtrain.models.hf.build import build_hf_model

    return build_hf_model(config)


def initial_values(model: nn.Module, config: ModelConfig, seed: int) -> dict[str, InitialValue]:
    """Return the initial value of every parameter of an unwrapped model from :func:`build_model`, by name.

    Native models follow GPT-2 (normal numbers with ``config.init_std``, divided by ``sqrt(2 * num_layers)`` where a
    block writes to the residual stream, norms 1, biases 0). Hugging Face models and own networks follow their own
    rules. ConfigError: published weights are missing or do not fit.
    """
    if config.kind is ModelKind.native and config.init_from:
        from bigtrain.models.hf.native import imported_values

        return imported_values(model, config)
    if config.kind is ModelKind.own:
        return own_values(model, config, seed)
    if config.kind is ModelKind.native:
        names = [name for name, _ in model.named_parameters()] + list(balances(model))
        return {name: native_value(name, config, seed) for name in names}
    from bigtrain.models.hf.heads import HFNetwork
    from bigtrain.models.hf.values import fresh_values, published_values

    assert isinstance(model, HFNetwork)
    return published_values(model, config, seed) if config.pretrained else fresh_values(model, seed)


def build_initial_values(config: ModelConfig, seed: int) -> dict[str, InitialValue]:
    """Return the initial value of every parameter of the model of ``config``, without adapters, by name."""
    with torch.device("meta"):
        model = _build(config)
    return initial_values(model, config, seed)
