"""Models: plain modules that know nothing of how they are spread over devices."""

import torch
from torch import nn

from bigtrain.config import ModelConfig, ModelKind
from bigtrain.models.init import InitialValue, native_value
from bigtrain.models.transformer import Transformer


def build_model(config: ModelConfig) -> nn.Module:
    """Build the model of ``config`` on the current default device, with parameters in fp32.

    Under ``with torch.device("meta")`` no memory is allocated for parameters (buffers, which only
    Hugging Face models have, are real and on the CPU). Parameters hold garbage; a run starts with

    1. ``with torch.device("meta"): model = build_model(config)``
    2. ``values = initial_values(model, config, seed)``
    3. shard it, if so wanted, and give the shards memory
    4. fill every parameter, or this rank's part of it, from ``values``.

    The result is called as ``model(tokens_BT)`` for logits and ``model(tokens_BT, targets_BT)`` for
    the summed loss; ``blocks`` is its ``ModuleList`` of decoder layers, ``vocab_size`` and
    ``max_positions`` are its limits.

    Raises:
        ConfigError: if a Hugging Face model cannot be found or is no causal language model.
    """
    if config.kind is ModelKind.native:
        return Transformer(config)
    from bigtrain.models.hf.build import build_hf_model

    return build_hf_model(config)


def initial_values(model: nn.Module, config: ModelConfig, seed: int) -> dict[str, InitialValue]:
    """Return the initial value of every parameter of a model from :func:`build_model`.

    Native models follow GPT-2: normal numbers with ``config.init_std``, divided by
    ``sqrt(2 * num_layers)`` where a block writes to the residual stream, norms 1, biases 0; or they
    are read from the GPT-2 or Llama that ``config.init_from`` names. Hugging Face models follow their
    own rules, or are read from their published weights.

    Args:
        model: as built, before any wrapping; on the meta device or not.
        config: what it was built from.
        seed: of the random numbers.

    Returns:
        One value per name of ``model.named_parameters()``; tied parameters appear once.

    Raises:
        ConfigError: if published weights are wanted but missing or do not fit.
    """
    if config.kind is ModelKind.native and config.init_from:
        from bigtrain.models.hf.native_values import imported_values

        return imported_values(model, config)
    if config.kind is ModelKind.native:
        return {name: native_value(name, config, seed) for name, _ in model.named_parameters()}
    from bigtrain.models.hf.values import fresh_values, published_values

    return published_values(model, config) if config.pretrained else fresh_values(model, seed)


def build_initial_values(config: ModelConfig, seed: int) -> dict[str, InitialValue]:
    """Return what every parameter of the model of ``config`` starts from, by name, without holding a model."""
    with torch.device("meta"):
        model = build_model(config)
    return initial_values(model, config, seed)
