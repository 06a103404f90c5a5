"""What does not go together with adapters."""

from bigtrain.config import TrainConfig
from bigtrain.config.choices import AdapterKind, EngineKind, OptimizerKind, Precision


def check_adapter(config: TrainConfig) -> list[str]:
    """Return what adapters of the model cannot be combined with."""
    adapter, engine = config.model.adapter, config.engine
    if adapter is None:
        return []
    rules = [
        (
            config.optimizer.kind is not OptimizerKind.muon,
            "model.adapter: optimizer=muon is for whole matrices, not for their factors; use optimizer=adamw",
        ),
        (
            engine.precision is not Precision.fp8,
            "model.adapter: not offered with engine.precision=fp8; use bf16",
        ),
        (
            adapter.kind is AdapterKind.lora or engine.kind is not EngineKind.zero3,
            "model.adapter.kind=dora: it reads whole weights, which engine=zero3 does not gather for it; use engine=fsdp",
        ),
    ]
    return [message for holds, message in rules if not holds]
