"""Does the run fit? An estimate of the memory of every rank, before anything is allocated.

The estimate counts what is known from the shapes: weights, gradients, optimizer state, activations that
the backward pass needs, logits. It does not know fragmentation, workspaces of libraries or what else
runs on the machine; for these a share and a fixed amount per process are added.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from bigtrain.checks import check
from bigtrain.config import (
    Activation,
    ActivationCheckpointing,
    EngineKind,
    ModelConfig,
    ModelKind,
    Offload,
    Positions,
    Precision,
    TrainConfig,
)
from bigtrain.models.sizes import ModelSizes, model_sizes

GIB = 2**30
MARGIN = 0.05
"""Share added for fragmentation and temporary buffers."""
PROCESS_BYTES = {"cuda": GIB, "cpu": GIB // 2}
"""Runtime of one process: CUDA context and NCCL buffers, or the libraries and the allocator's slack."""
ZERO3_LIVE_ELEMENTS = 1_000_000_000
"""DeepSpeed's default for ``stage3_max_live_parameters``."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes of one rank by component, on its device and, with offloading, in host memory."""

    device: dict[str, int]
    host: dict[str, int]


@dataclass(frozen=True, slots=True)
class Report:
    """What a run needs, what there is, and what would fit."""

    config: TrainConfig
    world_size: int
    local_world_size: int
    device_type: str
    estimate: Estimate
    available_bytes: int
    host_available_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the estimate is within what there is."""
        return _fits(self, self.estimate)

    def table(self) -> str:
        """Return the estimate as a table for people."""
        where = "GPU memory" if self.device_type == "cuda" else "memory"
        lines = [
            f"{self.config.model.name} does not fit: estimated {where} per rank under engine="
            f"{self.config.engine.kind.name}, world size {self.world_size}"
        ]
        lines += [f"  {name:<30}{size / GIB:>10.2f} GiB" for name, size in self.estimate.device.items() if size]
        lines.append(f"  {'needed':<30}{sum(self.estimate.device.values()) / GIB:>10.2f} GiB")
        lines.append(f"  {'there is':<30}{self.available_bytes / GIB:>10.2f} GiB")
        if self.estimate.host:
            host = sum(self.estimate.host.values())
            lines.append(f"  {'needed in host memory':<30}{host / GIB:>10.2f} GiB")
            lines.append(f"  {'there is in host memory':<30}{self.host_available_bytes / GIB:>10.2f} GiB")
        return "\n".join(lines)

    def suggestions(self) -> list[str]:
        """Return the settings that would fit on this machine, the smallest change first, or how many devices would."""
        fitting = [text for text, config in _variants(self.config) if self._would_fit(config)]
        if fitting:
            return ["these settings would fit:", *(f"  {text}" for text in fitting[:4])]
        return [self._devices_needed()]

    def _would_fit(self, config: TrainConfig) -> bool:
        if check(config, world_size=self.world_size, local_world_size=self.local_world_size):
            return False
        return _fits(self, estimate(config, self.world_size, self.local_world_size, self.device_type))

    def _devices_needed(self) -> str:
        _, smallest = list(_variants(self.config))[-1]
        smallest = dataclasses.replace(smallest, engine=dataclasses.replace(smallest.engine, offload=Offload.none))
        for world_size in (2**n for n in range(1, 15)):
            needed = estimate(smallest, world_size, world_size, self.device_type)
            if _fits(self, needed):
                return (
                    f"nothing fits here; about {world_size} such devices would, with engine=fsdp "
                    "engine.activation_checkpointing=full train.micro_batch_size=1"
                )
        return "nothing fits here, whatever the number of such devices; shorten data.sequence_length or choose a smaller model"


def preflight(
    config: TrainConfig, *, world_size: int, local_world_size: int, device_type: str, precision: Precision
) -> Report:
    """Return the report of a resolved configuration on this machine; takes milliseconds and allocates nothing."""
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=precision))
    host = _host_available_bytes() // local_world_size
    return Report(
        config,
        world_size,
        local_world_size,
        device_type,
        estimate(config, world_size, local_world_size, device_type),
        _gpu_available_bytes() if device_type == "cuda" else host,
        host,
    )


def estimate(config: TrainConfig, world_size: int, local_world_size: int, device_type: str) -> Estimate:
    """Estimate the memory of one rank.

    Args:
        config: resolved, with a precision.
        world_size: number of ranks.
        local_world_size: ranks on one node.
        device_type: ``cuda`` or ``cpu``; on a CPU, host memory is device memory.
    """
    sizes = _sizes(config.model)
    state = _state_bytes(config, sizes, world_size, local_world_size)
    offloaded = _offloaded(config)
    device = {name: size for name, size in state.items() if name not in offloaded or device_type == "cpu"}
    device["activations"] = _activation_bytes(config)
    device["loss buffers"] = _loss_bytes(config)
    device["margin"] = int(MARGIN * sum(device.values())) + PROCESS_BYTES[device_type]
    host = {} if device_type == "cpu" else {name: state[name] for name in offloaded if name in state}
    return Estimate(device, host)


def _state_bytes(config: TrainConfig, sizes: ModelSizes, world_size: int, local_world_size: int) -> dict[str, int]:
    """Weights, gradients and optimizer state: 16 bytes per parameter before sharding, plus engine buffers."""
    kind, bf16 = config.engine.kind, config.engine.precision is Precision.bf16
    whole, shard = sizes.total, -(-sizes.total // _shard_ranks(config, world_size, local_world_size))
    bucket = 4 * config.engine.deepspeed.bucket_elements
    if kind in (EngineKind.fsdp, EngineKind.hsdp):
        # While one block computes, the next one is gathered; its gradients are whole until they are reduced.
        gathered = sizes.total if not config.engine.fsdp.reshard_after_forward else sizes.root + 2 * sizes.block
        return {
            "parameters (masters)": 4 * shard,
            "gradients": 4 * (whole if config.engine.fsdp.accumulate_whole_gradients else shard),
            "optimizer moments": 8 * shard,
            "gathered parameters": (2 if bf16 else 4) * gathered,
            "gradients being reduced": 4 * (sizes.root + sizes.block),
        }
    cast = {"bf16 copies": 2 * whole} if bf16 and kind is not EngineKind.zero3 else {}
    if kind in (EngineKind.zero1, EngineKind.zero2):
        gradients = 4 * whole if kind is EngineKind.zero1 else 4 * shard + bucket
        return {
            "parameters": 4 * whole,
            "gradients": gradients,
            "master weights": 4 * shard,
            "optimizer moments": 8 * shard,
            "communication buckets": min(2 * bucket, 4 * whole),
            **cast,
        }
    if kind is EngineKind.zero3:
        gathered = min(whole, ZERO3_LIVE_ELEMENTS)
        return {
            "parameters (partitioned)": 4 * shard,
            "gradients": 4 * shard,
            **({"master weights": 4 * shard} if config.engine.offload is Offload.cpu else {}),
            "optimizer moments": 8 * shard,
            "gathered parameters": (6 if bf16 else 4) * gathered,
            "communication buckets": min(2 * bucket, 4 * whole),
        }
    return {"parameters (masters)": 4 * whole, "gradients": 4 * whole, "optimizer moments": 8 * whole, **cast}


def _shard_ranks(config: TrainConfig, world_size: int, local_world_size: int) -> int:
    if config.engine.kind is EngineKind.hsdp:
        return config.engine.dp_shard or local_world_size
    return world_size


def _offloaded(config: TrainConfig) -> tuple[str, ...]:
    """Return which components ``engine.offload=cpu`` keeps in host memory."""
    if config.engine.offload is Offload.none:
        return ()
    if config.engine.kind in (EngineKind.zero1, EngineKind.zero2):
        return ("master weights", "optimizer moments")
    return ("parameters (masters)", "parameters (partitioned)", "gradients", "master weights", "optimizer moments")


def _activation_bytes(config: TrainConfig) -> int:
    """Return what the backward pass of one micro-batch needs from the forward pass.

    Counted per token and block from what autograd saves, as Korthikanti et al. (arXiv 2205.05198, section
    4.1) do, for attention that does not store its T x T scores.
    """
    model, engine = config.model, config.engine
    tokens = config.train.micro_batch_size * config.data.sequence_length
    element = 2 if engine.precision is Precision.bf16 else 4
    hidden, query = model.hidden_dim, model.num_heads * model.head_dim
    qkv = query + 2 * model.num_kv_heads * model.head_dim
    inner = model.ffn_dim * (2 if model.activation is Activation.swiglu else 1)
    # Inputs and outputs of both norms, q, k, v, the attention's output, and the feed-forward's inner values
    # before and after the non-linearity; rotation keeps fp32 copies of q and k.
    full = element * (4 * hidden + qkv + query + 2 * inner)
    full += 8 * qkv if model.positions is Positions.rope else 0
    full += 3 * hidden if model.dropout else 0
    kept = {
        ActivationCheckpointing.none: full,
        ActivationCheckpointing.selective: element * (3 * hidden + qkv + query + inner),
        ActivationCheckpointing.full: element * hidden,
    }[engine.activation_checkpointing]
    every = engine.activation_checkpointing_every
    num_wrapped = -(-model.num_layers // every)
    per_token = num_wrapped * kept + (model.num_layers - num_wrapped) * full
    recomputed = 0 if engine.activation_checkpointing is ActivationCheckpointing.none else full
    return tokens * (per_token + recomputed + 2 * element * hidden)


def _loss_bytes(config: TrainConfig) -> int:
    """Return logits, their logarithmic softmax and both gradients: fp32, beside bf16 logits in mixed precision."""
    tokens = config.train.micro_batch_size * config.data.sequence_length
    return tokens * config.model.vocab_size * (16 if config.engine.precision is Precision.bf16 else 12)


def _variants(config: TrainConfig) -> list[tuple[str, TrainConfig]]:
    """Return (settings, configuration) pairs, from the smallest change to the largest."""
    every = [config.train.micro_batch_size, 1]
    kinds = [config.engine.kind, EngineKind.fsdp]
    variants = []
    for kind in dict.fromkeys(kinds):
        for offload in (config.engine.offload, Offload.cpu):
            for checkpointing in (config.engine.activation_checkpointing, ActivationCheckpointing.full):
                for micro_batch_size in every:
                    engine = dataclasses.replace(
                        config.engine, kind=kind, offload=offload, activation_checkpointing=checkpointing
                    )
                    train = dataclasses.replace(config.train, micro_batch_size=micro_batch_size)
                    variant = dataclasses.replace(config, engine=engine, train=train)
                    variants.append((_settings(config, variant), variant))
    return list({text: (text, variant) for text, variant in variants if text}.values())


def _settings(config: TrainConfig, variant: TrainConfig) -> str:
    """Return what to type to get from ``config`` to ``variant``."""
    old, new = config.engine, variant.engine
    settings = []
    if new.kind is not old.kind:
        settings.append(f"engine={new.kind.name}")
    if new.offload is not old.offload:
        settings.append(f"engine.offload={new.offload.name}")
    if new.activation_checkpointing is not old.activation_checkpointing:
        settings.append(f"engine.activation_checkpointing={new.activation_checkpointing.name}")
    if variant.train.micro_batch_size != config.train.micro_batch_size:
        settings.append(f"train.micro_batch_size={variant.train.micro_batch_size}")
    return " ".join(settings)


def _fits(report: Report, needed: Estimate) -> bool:
    return (
        sum(needed.device.values()) <= report.available_bytes
        and sum(needed.host.values()) <= report.host_available_bytes
    )


def _sizes(model: ModelConfig) -> ModelSizes:
    if model.kind is ModelKind.native:
        return model_sizes(model)
    import torch

    from bigtrain.models import build_model

    with torch.device("meta"):
        built = build_model(model)
    block = sum(parameter.numel() for parameter in built.blocks[0].parameters())
    total = sum(parameter.numel() for parameter in built.parameters())
    return ModelSizes(total - block * len(built.blocks), block, len(built.blocks))


def _gpu_available_bytes() -> int:
    import torch

    return torch.cuda.mem_get_info()[0]


def _host_available_bytes() -> int:
    """Return the free memory of this machine, or of the container or job that this process is confined to."""
    import psutil

    available = psutil.virtual_memory().available
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            confined = int(Path(limit).read_text()) - int(Path(usage).read_text())
        except (OSError, ValueError):  # no such version of cgroups, or "max"
            continue
        available = min(available, max(confined, 0))
    return available
