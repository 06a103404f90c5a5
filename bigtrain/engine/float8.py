"""``engine.precision=fp8``: matrix products in 8 bits, by torchao, where that is faster. The only importer of torchao.

Weights stay what they are, fp32 masters that engines shard and checkpoints hold; torchao casts them, the inputs and the
gradients to 8 bits in front of each product, each tensor with a scale of its own (its ``tensorwise`` recipe).
"""

from torch import nn

from bigtrain.config.packages import require
from bigtrain.log import quiet_torchao
from bigtrain.models.construction import find_stacks

MULTIPLE = 16  # every side of a product in 8 bits is a multiple of this
WORTHWHILE = 1024  # see :func:`is_faster`


def is_faster(num_tokens: int, num_inputs: int, num_outputs: int) -> bool:
    """Return whether a linear layer is faster in 8 bits, casts included.

    The three products of a layer have 6 operations per token, input and output, of which 8 bits save half the time;
    casting reads and writes each of the three operands a few times. What is saved outweighs that when
    ``1 / tokens + 1 / inputs + 1 / outputs`` is below the time of an operation in that of a cast, about 1 / 700 on an
    H100. torchao's examples (torchao/float8/README.md, "Performance"): 0.80 x the speed for 1024 x 2048 x 1024, which
    it recommends to leave in bf16, and 1.39 x for 4096 x 8192 x 16384. On the border it is left in bf16.
    """
    sizes = num_tokens, num_inputs, num_outputs
    return not any(size % MULTIPLE for size in sizes) and sum(1 / size for size in sizes) <= 1 / WORTHWHILE


def use_float8(model: nn.Module, *, num_tokens: int) -> None:
    """Let large linear layers of a model's blocks compute in 8 bits (torchao), for micro-batches of ``num_tokens``."""
    quiet_torchao()
    require("engine.precision=fp8", "torchao", "fp8")
    from torchao.float8 import convert_to_float8_training

    def is_converted(module: nn.Module, _name: str) -> bool:
        return isinstance(module, nn.Linear) and is_faster(num_tokens, module.in_features, module.out_features)

    fused = {name: module.fused_rows for name, module in model.named_modules() if hasattr(module, "fused_rows")}
    for block in (block for stack in find_stacks(model) for block in stack):
        convert_to_float8_training(block, module_filter_fn=is_converted)
    for name, rows in fused.items():  # torchao makes new modules, and Muon has to know
        model.get_submodule(name).fused_rows = rows
