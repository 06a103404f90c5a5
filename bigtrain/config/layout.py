"""How the ranks of a run are laid out: the sizes of the mesh's axes as integers, which need no process group."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from bigtrain.config import (
    CpMethod,
    EngineConfig,
    EngineKind,
    ModelConfig,
    ModelKind,
    Offload,
    OptimizerKind,
    ParallelConfig,
    PpSchedule,
    Precision,
    TaskKind,
    TrainConfig,
    TrainingConfig,
)
from bigtrain.config.parallel import AXES, copies, shared

TP_KINDS = (EngineKind.ddp, EngineKind.fsdp, EngineKind.hsdp, EngineKind.zero1, EngineKind.zero2)
"""Engines under which ranks can share matrices; the others own whole parameters."""

CP_KINDS = (EngineKind.ddp, EngineKind.fsdp, EngineKind.hsdp)
"""Engines under which ranks can share sequences."""

PP_KINDS = CP_KINDS
"""Engines under which ranks can be stages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The axes of the mesh, the slowest network first."""

    pp: int = 1
    """Ranks that have some blocks each, and load the same samples."""
    dp_replicate: int = 1
    """Copies of the state."""
    dp_shard: int = 1
    """Ranks that share one copy of the state, by whole samples."""
    tp: int = 1
    """Ranks that share every matrix, and load the same samples."""
    cp: int = 1
    """Ranks that share every sequence, and load the same samples; no axis of its own for the state: they are among those
    of ``dp_shard``, or of ``dp_replicate`` where each rank has a copy of it."""
    ep: int = 1
    """Ranks that share out the experts, and load different samples: some of those of ``dp_shard`` or ``dp_replicate``."""

    @property
    def axes(self) -> dict[str, int]:
        stages = {"pp": self.pp} if self.pp > 1 else {}
        return stages | {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, "tp": self.tp}

    @property
    def world_size(self) -> int:
        return math.prod(self.axes.values())

    @property
    def dp_size(self) -> int:
        """Ranks that load different samples."""
        return self.num_holders // self.cp

    @property
    def num_holders(self) -> int:
        """Ranks of a stage among which what a rank holds of the matrices is spread or copied."""
        return self.dp_replicate * self.dp_shard

    @property
    def expert_axes(self) -> dict[str, int]:
        """The same ranks, as those that hold the same experts and those that hold others."""
        if self.dp_shard == 1:
            return {"replicate": self.dp_replicate // self.ep, "efsdp": 1, "ep": self.ep}
        return {"replicate": self.dp_replicate, "efsdp": self.dp_shard // self.ep, "ep": self.ep}

    @property
    def copies(self) -> int:
        """Ranks that load the same samples."""
        return self.pp * self.cp * self.tp

    @property
    def token_multiple(self) -> int:
        """What the length of a sequence divides by: ranks that share it have two runs of it each."""
        return token_multiple(self.tp, self.cp)


def layout_of(engine: EngineConfig, parallel: ParallelConfig, *, world_size: int, local_world_size: int) -> Layout:
    """Return the layout of a checked configuration: ``fsdp`` and ZeRO share one copy of the state among all ranks."""
    num_holders = world_size // (parallel.tp * parallel.pp)
    dp_shard = num_holders
    if engine.kind in (EngineKind.ddp, EngineKind.accelerate):
        dp_shard = 1
    elif engine.kind is EngineKind.hsdp:
        dp_shard = (engine.dp_shard or data_ranks_of_node(parallel, world_size, local_world_size)) * parallel.cp
    shares = {name: getattr(parallel, name) for name in AXES}
    return Layout(dp_replicate=num_holders // dp_shard, dp_shard=dp_shard, **shares)


def data_ranks(parallel: ParallelConfig, world_size: int) -> int:
    """Return how many ranks load different samples, also of a configuration that is not checked yet."""
    return max(world_size // max(copies(parallel), 1), 1)


def data_ranks_of_node(parallel: ParallelConfig, world_size: int, local_world_size: int) -> int:
    """Return how many ranks of a node load different samples, of those that have the same blocks."""
    stage_size = world_size // max(parallel.pp, 1)
    return data_ranks(dataclasses.replace(parallel, pp=1), min(local_world_size, stage_size))


def padding(train: TrainingConfig, dp_size: int) -> list[str]:
    """Return a warning with the share of the computing that is padding, where it is more than 1 %."""
    places = train.micro_batches(dp_size) * train.micro_batch_size * dp_size
    if places <= 1.01 * train.global_batch_size:
        return []
    return [
        f"{1 - train.global_batch_size / places:.0%} of the computing is padding: {dp_size} ranks with micro-batches of "
        f"{train.micro_batch_size} have {places} places for train.global_batch_size={train.global_batch_size}"
    ]


def token_multiple(tp: int, cp: int) -> int:
    """Return what the length of a sequence has to divide by."""
    return cp * math.lcm(tp, 2) if cp > 1 else tp


def share(number: int, size: int, rank: int) -> range:
    """Return a rank's part of ``number`` things; the parts of ``size`` ranks differ by one at most."""
    return range(number * rank // size, number * (rank + 1) // size)


def stage_blocks(num_blocks: int, number: int, num_stages: int) -> range:
    """Return the blocks of a stage; embedding and head count as a block each where no stage is left without one."""
    for extra in (1, 0):
        parts = [share(num_blocks + 2 * extra, num_stages, stage) for stage in range(num_stages)]
        blocks = [range(max(part.start - extra, 0), min(part.stop - extra, num_blocks)) for part in parts]
        if all(blocks):
            break
    return blocks[number]


def layout_problems(config: TrainConfig, world_size: int, local_world_size: int) -> Iterator[str]:
    """Yield what stands against the layout of a resolved configuration, each with what to change."""
    parallel = config.parallel
    if min(getattr(parallel, name) for name in AXES) < 1:
        return  # out of bounds
    if (number := copies(parallel)) > 1 and world_size % number:
        product = " x ".join(setting for setting in shared(parallel) if ".ep=" not in setting)
        yield f"{product} does not divide the world size {world_size}; {_other_worlds(world_size, number)}"
    yield from tensor_problems(config)
    yield from context_problems(config)
    yield from pipeline_problems(config, world_size)
    yield from expert_problems(config, world_size, local_world_size)


def expert_problems(config: TrainConfig, world_size: int, local_world_size: int) -> Iterator[str]:
    """Yield what stands against sharing out experts, each with what to change."""
    engine, model, ep = config.engine, config.model, config.parallel.ep
    set_to = f"parallel.ep={ep}"
    if ep <= 1:
        return
    if engine.kind not in CP_KINDS:
        yield f"{set_to}: not offered by engine={engine.kind.name}; use engine=ddp, fsdp or hsdp"
    if model.kind is not ModelKind.native or model.moe is None:
        yield f"{set_to}: {model.name} has no experts of bigtrain's own; leave it out, or choose a model with model.moe"
        return
    if model.moe.num_experts % ep:
        fitting = [n for n in range(1, model.moe.num_experts + 1) if model.moe.num_experts % n == 0]
        yield f"{set_to}: the model has {model.moe.num_experts} experts; use one of {', '.join(map(str, fitting))}"
    if engine.kind is EngineKind.hsdp:
        shards = engine.dp_shard or data_ranks_of_node(config.parallel, world_size, local_world_size)
        if shards % ep:
            yield f"{set_to} does not divide engine.dp_shard={shards}; use engine.dp_shard={-(-shards // ep) * ep}"
    elif world_size % ep:
        yield f"{set_to} does not divide the world size {world_size}; {_other_worlds(world_size, ep)}"
    if config.optimizer.kind is OptimizerKind.muon:
        yield f"{set_to}: optimizer=muon is not offered with it; use optimizer=adamw"
    if engine.offload is not Offload.none:
        yield f"{set_to}: engine.offload=cpu is not offered with it; leave it out"


def pipeline_problems(config: TrainConfig, world_size: int) -> Iterator[str]:
    """Yield what stands against stages, each with what to change."""
    engine, model, parallel = config.engine, config.model, config.parallel
    set_to, num_stages = f"parallel.pp={parallel.pp}", parallel.num_stages
    if parallel.pp <= 1:
        return
    if engine.kind not in PP_KINDS:
        yield f"{set_to}: not offered by engine={engine.kind.name}; use engine=ddp, fsdp or hsdp"
    if model.kind is not ModelKind.native:
        yield f"{set_to}: only bigtrain's own models have stages; leave it out with +model={model.kind.name}"
        return
    if model.num_layers < num_stages:
        yield f"{set_to}: {num_stages} stages need as many blocks, and model.num_layers={model.num_layers}"
    train, dp_size = config.train, data_ranks(parallel, world_size)
    number = train.micro_batches(dp_size) if train.micro_batch_size else parallel.pp
    if number < parallel.pp or (parallel.pp_schedule is PpSchedule.interleaved and number % parallel.pp):
        wanted = -(-max(number, parallel.pp) // parallel.pp) * parallel.pp
        kind = (
            f"a multiple of {parallel.pp}"
            if parallel.pp_schedule is PpSchedule.interleaved
            else f"{parallel.pp} or more"
        )
        instead = f"train.global_batch_size={wanted * dp_size * (train.micro_batch_size or 1)}"
        yield (
            f"{set_to}: a step has {number} micro-batches on each rank, and parallel.pp_schedule="
            f"{parallel.pp_schedule.name} needs {kind}; use {instead}, or a smaller train.micro_batch_size"
        )
    if config.task.kind != TaskKind.causal_lm:
        yield f"{set_to}: task={config.task.kind} is not offered with it; use task=causal_lm"
    if config.optimizer.kind is OptimizerKind.muon:
        yield f"{set_to}: optimizer=muon is not offered with it; use optimizer=adamw"
    for name, value, is_off in (
        ("engine.offload", engine.offload.name, engine.offload is Offload.none),
        ("engine.precision", "fp8", engine.precision is not Precision.fp8),
    ):
        if not is_off:
            yield f"{set_to}: {name}={value} is not offered with it; leave it out"
    yield from _not_beside(set_to, model, "moe", "adapter", "freeze")
    for name in ("prompts", "lm_eval"):
        if getattr(config.validation, name):
            yield f"{set_to}: validation.{name} is not offered with it; leave it out"


def context_problems(config: TrainConfig) -> Iterator[str]:
    """Yield what stands against sharing the sequences of a resolved configuration, each with what to change."""
    engine, model, tp, cp = config.engine, config.model, config.parallel.tp, config.parallel.cp
    set_to = f"parallel.cp={cp}"
    if cp <= 1 or tp < 1:
        return
    if engine.kind not in CP_KINDS:
        yield f"{set_to}: not offered by engine={engine.kind.name}; use engine=ddp, fsdp or hsdp"
    if model.kind is not ModelKind.native:
        yield f"{set_to}: only bigtrain's own models share sequences; leave it out with +model={model.kind.name}"
        return
    if (length := config.data.sequence_length or 0) % (multiple := token_multiple(tp, cp)):
        longer = -(-length // multiple) * multiple
        yield (
            f"{set_to}: data.sequence_length={length} does not divide by {multiple}, two runs of tokens for each rank; "
            f"use data.sequence_length={longer}"
        )
    if config.parallel.cp_method is CpMethod.ulysses:
        heads, kv_heads = model.num_heads // tp, model.num_kv_heads // tp
        if heads % cp or not kv_heads or (kv_heads % cp and cp % kv_heads):
            ours = f"{heads} heads and {kv_heads} of keys and values" + (" of a rank" if tp > 1 else "")
            yield f"{set_to}: parallel.cp_method=ulysses cannot deal out {ours}; use parallel.cp_method=gather"
    if config.task.kind != TaskKind.causal_lm:
        yield f"{set_to}: task={config.task.kind} reads whole sequences; use task=causal_lm"
    if engine.precision is Precision.fp8:
        yield f"{set_to}: engine.precision=fp8 is not offered with it; use bf16"
    yield from _not_beside(set_to, model, "moe", "adapter")
    for name in ("prompts", "lm_eval"):
        if getattr(config.validation, name) and model.max_positions % multiple:
            instead = f"use model.max_positions={-(-model.max_positions // multiple) * multiple}"
            yield f"{set_to}: validation.{name} pads texts to a multiple of {multiple}; {instead}"


def _not_beside(set_to: str, model: ModelConfig, *names: str) -> Iterator[str]:
    for name in names:
        if getattr(model, name):
            yield f"{set_to}: model.{name} is not offered with it; leave one of them out"


def _other_worlds(world_size: int, number: int) -> str:
    below = world_size // number * number
    return f"use {below} or {below + number} ranks" if below else f"use {number} ranks"


def tensor_problems(config: TrainConfig) -> Iterator[str]:
    """Yield what stands against sharing the matrices of a resolved configuration, each with what to change."""
    engine, model, kind, tp = config.engine, config.model, config.engine.kind, config.parallel.tp
    set_to = f"parallel.tp={tp}"
    if tp <= 1:
        return
    if kind not in TP_KINDS:
        yield f"{set_to}: engine={kind.name} owns whole parameters; use engine=fsdp"
    if model.kind is not ModelKind.native:
        yield f"{set_to}: only bigtrain's own models are cut; leave it out with +model={model.kind.name}"
        return
    if model.num_kv_heads % tp:
        fitting = [n for n in range(1, model.num_kv_heads + 1) if model.num_kv_heads % n == 0]
        yield f"{set_to}: the model has {model.num_kv_heads} key/value heads; use a tp of {', '.join(map(str, fitting))}"
    if (length := config.data.sequence_length or tp) % tp and config.parallel.cp == 1:
        longer = -(-length // tp) * tp
        yield f"{set_to}: data.sequence_length={length} does not divide by it; use data.sequence_length={longer}"
    if smaller := [name for name in ("vocab_size", "ffn_dim") if getattr(model, name) < tp]:
        yield f"{set_to}: model.{smaller[0]}={getattr(model, smaller[0])} is less than a row for each rank"
    elif kind in (EngineKind.zero1, EngineKind.zero2):
        for name in ("vocab_size", "ffn_dim"):
            if (size := getattr(model, name)) % tp:
                instead = f"use engine=fsdp, or model.{name}={-(-size // tp) * tp}"
                yield f"{set_to}: model.{name}={size} does not divide by it, as engine={kind.name} needs; {instead}"
        if engine.offload is not Offload.none:
            yield f"{set_to}: engine.offload=cpu is not offered with engine={kind.name}; use engine=fsdp"
    if config.task.kind != TaskKind.causal_lm:
        yield f"{set_to}: task={config.task.kind} reads whole logits, of which each rank has a part; use task=causal_lm"
    if config.parallel.ep > 1:
        yield f"{set_to}: parallel.ep={config.parallel.ep} is not offered with it; leave one of them out"
    if model.moe and kind in (EngineKind.zero1, EngineKind.zero2):
        yield f"{set_to}: engine={kind.name} is not offered with model.moe; use engine=fsdp"
    yield from _not_beside(set_to, model, "adapter")
    if engine.precision is Precision.fp8:
        yield f"{set_to}: engine.precision=fp8 is not offered with it; use bf16"
    for name in ("prompts", "lm_eval"):
        if getattr(config.validation, name) and model.max_positions % tp and config.parallel.cp == 1:
            instead = f"use model.max_positions={-(-model.max_positions // tp) * tp}"
            yield f"{set_to}: validation.{name} pads texts to a multiple of it; {instead}"


def layout_warnings(config: TrainConfig, local_world_size: int) -> list[str]:
    """Return a warning where every block would wait for the network between nodes."""
    if config.parallel.tp <= local_world_size:
        return []
    return [
        f"parallel.tp={config.parallel.tp} reaches over nodes of {local_world_size} ranks: every block waits for the network"
    ]
