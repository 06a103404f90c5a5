"""Models: plain modules that know nothing of how they are spread over devices."""

import torch
from torch import nn

from bigtrain.config import ModelConfig, ModelKind
from bigtrain.models.init import InitialValue, initial_values
from bigtrain.models.transformer import Transformer


def build_model(config: ModelConfig) -> nn.Module:
    """Build the model of ``config`` on the current default device, with parameters in fp32.

    Under ``with torch.device("meta")`` no memory is allocated for parameters (buffers, which only
    Hugging Face models have, are real and on the CPU). Parameters hold garbage; a run starts with

    1. ``with torch.device("meta"): model = build_model(config)``
    2. ``values = initial_values(model, config, seed)`` (see ``init.py``)
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
    from bigtrain.models.hf import build_hf_model

    return build_hf_model(config)


def build_initial_values(config: ModelConfig, seed: int) -> dict[str, InitialValue]:
    """Return what every parameter of the model of ``config`` starts from, by name, without holding a model."""
    with torch.device("meta"):
        model = build_model(config)
    return initial_values(model, config, seed)
