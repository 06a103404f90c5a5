"""What does not go together with adapters."""

from collections.abc import Iterator

from bigtrain.config import TrainConfig
from bigtrain.config.choices import AdapterKind, EngineKind, OptimizerKind, Precision


def check_adapter(config: TrainConfig) -> Iterator[str]:
    """Yield what adapters of the model cannot be combined with."""
    adapter, engine = config.model.adapter, config.engine
    if adapter is None:
        return
    if config.optimizer.kind is OptimizerKind.muon:
        yield "model.adapter: optimizer=muon is for whole matrices, not for their factors; use optimizer=adamw"
    if engine.precision is Precision.fp8:
        yield "model.adapter: not offered with engine.precision=fp8; use bf16"
    if adapter.kind is not AdapterKind.lora and engine.kind is EngineKind.zero3:
        instead = "which engine=zero3 does not gather for it; use engine=fsdp"
        yield f"model.adapter.kind=dora: it reads whole weights, {instead}"
