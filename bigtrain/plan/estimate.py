"""Memory of one rank in training, counted from shapes.

State as each engine lays it out, activations (``models/sizes.py``), the loss, and the engines' own copies. Every layout
was compared with the peak memory of real steps on a CPU.
"""

import dataclasses
from dataclasses import dataclass, field

from bigtrain.config import (
    ActivationCheckpointing,
    EngineKind,
    ModelConfig,
    ModelKind,
    Offload,
    OptimizerConfig,
    OptimizerKind,
    Precision,
    TrainConfig,
)
from bigtrain.config.check import FSDP_KINDS, ZERO_KINDS
from bigtrain.config.layout import Layout, layout_of, stage_blocks
from bigtrain.models.sizes import (
    ActivationBytes,
    ModelSizes,
    Numerics,
    activation_bytes,
    is_language_model,
    loss_bytes,
    model_sizes,
    native_shape,
    part_of_rank,
)

COMPONENTS = (
    "parameters",
    "gradients",
    "master weights",
    "optimizer moments",
    "activations",
    "loss buffers",
    "checkpoint copy",
    "engine buffers",
)
ZERO3_LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's ``stage3_max_live_parameters``, ``sub_group_size`` ...


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory of one rank in bytes, by component."""

    device: dict[str, int]  # largest size of every component on the device
    host: dict[str, int]  # what ``engine.offload=cpu`` keeps in host memory, and what saving does
    not_at_once: int  # by how much the peak on the device is below the sum of its components

    @property
    def device_bytes(self) -> int:
        """Peak on the device."""
        return sum(self.device.values()) - self.not_at_once

    @property
    def host_bytes(self) -> int:
        """Peak in host memory, besides the device's if that is the host."""
        return sum(self.host.values())


@dataclass(slots=True, kw_only=True)
class _Layout:
    """Bytes that an engine keeps on the device, besides activations and loss."""

    state: dict[str, int]  # parameters, gradients, master weights, optimizer moments
    early_gradients: int  # the part of the gradients that exists already when the backward pass begins
    gathered: int = 0  # copies of weights that exist during forward and backward pass
    backward: int  # buckets and temporary gradients of the backward pass
    update: int = 0  # copies made while the weights are updated
    host: dict[str, int] = field(default_factory=dict)


def measure_model(model: ModelConfig) -> tuple[ModelSizes, ModelConfig | None]:
    """Return the numbers of parameters, and the native shape with the most similar activations, if there is one.

    Parameters of other types count as as many fp32 ones as take their memory.
    """
    if model.kind is ModelKind.native and not (model.freeze or model.adapter):
        return model_sizes(model), model
    import torch

    from bigtrain.models import build_model
    from bigtrain.models.adapters import plain_name
    from bigtrain.models.construction import find_stacks
    from bigtrain.models.freeze import frozen_names
    from bigtrain.models.hf.heads import HFNetwork

    with torch.device("meta"):
        built = build_model(model)
    parameters = {plain_name(name): parameter for name, parameter in built.named_parameters()}
    frozen = sum(parameters[name].nbytes for name in frozen_names(parameters, model)) // 4
    if model.kind is ModelKind.native and not model.adapter:
        return dataclasses.replace(model_sizes(model), frozen=frozen), model
    total = sum(p.nbytes for p in built.parameters()) // 4
    blocks = [block for stack in find_stacks(built) for block in stack]
    num_layers = len(blocks) or 1
    block = sum(p.nbytes for block in blocks for p in block.parameters()) // 4 // num_layers
    matrices = [p.numel() for block in blocks for p in block.parameters() if p.ndim == 2]
    sizes = ModelSizes(
        root=total - block * num_layers,
        block=block,
        num_layers=num_layers,
        matrices=sum(matrices) // num_layers,
        largest=max(matrices, default=0),
        frozen=frozen,
    )
    if model.kind is ModelKind.native:
        return sizes, model
    if not isinstance(built, HFNetwork) or not is_language_model(model):
        return sizes, None
    return sizes, native_shape(built.causal_lm.config.get_text_config())


def estimate(
    config: TrainConfig,
    *,
    world_size: int,
    precision: Precision,
    local_world_size: int | None = None,
    device_type: str = "cuda",
    measured: tuple[ModelSizes, ModelConfig | None] | None = None,
    pp_rank: int | None = None,
) -> Estimate:
    """Estimate the memory of one rank in training with a resolved configuration.

    Of a pipeline that is the rank ``pp_rank``, by default the one that needs most. ``local_world_size`` is the default shard group of ``hsdp``, by default all ranks; ``measured`` is of
    :func:`measure_model`.
    """
    sizes, shape = measured or measure_model(config.model)
    node = local_world_size or world_size
    ranks = layout_of(config.engine, config.parallel, world_size=world_size, local_world_size=node)
    if ranks.tp > 1:
        shape = part_of_rank(config.model, ranks.tp)
        sizes = dataclasses.replace(model_sizes(shape), frozen=sizes.frozen // ranks.tp)
    bf16 = precision.base is Precision.bf16
    asked = range(ranks.pp) if pp_rank is None else [pp_rank]
    found = (_of_rank(config, sizes, shape, ranks, bf16, device_type, rank) for rank in asked)
    return max(found, key=lambda rank: rank.device_bytes)


def _of_rank(
    config: TrainConfig,
    sizes: ModelSizes,
    shape: ModelConfig | None,
    ranks: Layout,
    bf16: bool,
    device_type: str,
    pp_rank: int,
) -> Estimate:
    """Estimate the memory of one rank, of ``sizes`` and ``shape`` that its tensor-parallel part of the model has."""
    engine, num_sequences, length = config.engine, config.train.micro_batch_size, config.data.sequence_length
    in_flight = 1.0
    if ranks.pp > 1:
        shape, in_flight = _of_stages(shape, config, ranks, pp_rank)
        sizes = model_sizes(shape)
        if pp_rank not in (0, ranks.pp - 1):  # neither embedding nor head
            sizes = dataclasses.replace(sizes, root=0)
        # The schedule keeps its weights gathered, and their gradients whole, until the last micro-batch.
        whole = dataclasses.replace(engine.fsdp, reshard_after_forward=False, accumulate_whole_gradients=True)
        config = dataclasses.replace(config, engine=dataclasses.replace(engine, fsdp=whole))
    layout = _layout(config, sizes, ranks, bf16, device_type)
    numerics = Numerics(
        element_bytes=2 if bf16 else 4,
        # FSDP casts the whole model, the others autocast, which leaves the residual stream in fp32.
        residual_bytes=2 if bf16 and engine.kind in FSDP_KINDS else 4,
        on_cpu=device_type == "cpu",
        compiled=engine.compile,
        tp=ranks.tp,
        cp=ranks.cp,
        cp_method=config.parallel.cp_method,
    )
    activations, loss = ActivationBytes(0, 0), 0
    if shape:
        has_loss = pp_rank == ranks.pp - 1
        loss = has_loss * loss_bytes(shape, num_tokens=num_sequences * length // ranks.cp, numerics=numerics)
        activations = activation_bytes(
            shape,
            num_sequences=num_sequences,
            sequence_length=length,
            checkpointing=engine.activation_checkpointing,
            every=engine.activation_checkpointing_every,
            numerics=numerics,
        )
        activations = dataclasses.replace(activations, saved=int(activations.saved * in_flight))
    device = dict.fromkeys(COMPONENTS, 0) | layout.state
    device["activations"] = activations.saved + activations.recomputed
    device["loss buffers"] = loss
    device["engine buffers"] = layout.gathered + max(layout.backward, layout.update)
    # As activations are freed gradients grow: the peak is at either end of the backward pass, or in the update.
    peak = max(
        activations.saved + loss + layout.gathered + layout.early_gradients,
        activations.saved + activations.recomputed + layout.gathered + layout.backward + layout.early_gradients,
        device["gradients"] + layout.gathered + layout.backward,
        device["gradients"] + layout.update,
    )
    peak += sum(layout.state.values()) - device["gradients"]
    # Saving copies the rank's share of the state to the host first, into memory that is kept.
    is_copied = config.checkpoint.asynchronous or device_type != "cpu"
    saved = 4 * sizes.trained + _moment_bytes(config.optimizer, sizes)
    staged = {"checkpoint copy": -(-saved // ranks.num_holders) if is_copied else 0}
    host = {name: (layout.host | staged).get(name, 0) for name in COMPONENTS}
    return Estimate(device, host, not_at_once=sum(device.values()) - peak)


def _of_stages(shape: ModelConfig, config: TrainConfig, ranks: Layout, pp_rank: int) -> tuple[ModelConfig, float]:
    """Return the shape of what a rank of a pipeline holds, and how often its activations exist at a time.

    In ``one_f_one_b`` a rank has a micro-batch in flight for itself and each rank behind it; interleaved, as many
    stages' as it begins with (Narayanan et al. 2021, section 2.2, with torch's twice as long warm-up).
    """
    parallel, num_micro_batches = config.parallel, config.train.micro_batches(ranks.dp_size)
    per_rank = parallel.num_stages // parallel.pp
    stages = range(pp_rank, parallel.num_stages, parallel.pp)
    num_layers = sum(len(stage_blocks(shape.num_layers, stage, parallel.num_stages)) for stage in stages)
    begun = min(parallel.pp - pp_rank, num_micro_batches)
    if per_rank > 1:
        warm_up = 2 * (parallel.pp - pp_rank - 1) + (per_rank - 1) * parallel.pp
        begun = min(warm_up + 1, num_micro_batches * per_rank)
    return dataclasses.replace(shape, num_layers=num_layers, tie_embeddings=True), begun / per_rank


def _layout(config: TrainConfig, sizes: ModelSizes, ranks: Layout, bf16: bool, device_type: str) -> _Layout:
    kind, dp_size = config.engine.kind, ranks.num_holders
    accumulates = config.train.micro_batches(ranks.dp_size) > 1
    if kind in FSDP_KINDS:
        layout = _fsdp_layout(config, sizes, ranks.dp_shard, accumulates, bf16)
    elif kind is EngineKind.zero3:
        layout = _zero3_layout(config, sizes, dp_size, bf16)
    elif kind in (EngineKind.zero1, EngineKind.zero2):
        layout = _zero12_layout(config, sizes, dp_size, accumulates, bf16, device_type)
    else:
        has_early_gradients = accumulates or dp_size > 1 or kind is EngineKind.accelerate
        layout = _ddp_layout(config, sizes, bf16, has_early_gradients)
    if config.model.adapter and config.model.adapter.nf4:
        layout.backward += 12 * sizes.largest  # a matrix in fp32, of whose codes two are a byte, and their indices
    if config.optimizer.kind is OptimizerKind.muon:
        is_sharded = kind in (*FSDP_KINDS, *ZERO_KINDS) or ranks.tp > 1
        num_owners = ranks.dp_shard if is_sharded else dp_size
        layout.update += (2 if bf16 else 4) * _muon_elements(sizes, num_owners, is_sharded)
    if config.logging.layer_norms_every_steps and config.engine.offload is Offload.none:
        layout.update += 4 * -(-sizes.trained // dp_size)  # the weights before the update
    return layout


def _moment_bytes(optimizer: OptimizerConfig, sizes: ModelSizes) -> int:
    """Return the size of the optimizer's whole state: two numbers per parameter, one for SGD and Muon's matrices; an average."""
    average = 4 * sizes.trained if optimizer.average else 0
    if optimizer.kind is OptimizerKind.sgd:
        return average + (4 * sizes.trained if optimizer.betas[0] else 0)
    by_muon = min(sizes.num_layers * sizes.matrices, sizes.trained) if optimizer.kind is OptimizerKind.muon else 0
    return average + 8 * sizes.trained - 4 * by_muon


def _muon_elements(sizes: ModelSizes, num_owners: int, is_sharded: bool) -> int:
    """Return the elements in flight in Muon's update: 5 copies of what is orthogonalised, later what is exchanged."""
    from bigtrain.optim.muon import IN_FLIGHT_ELEMENTS

    owned = min(max(IN_FLIGHT_ELEMENTS, sizes.largest), -(-sizes.num_layers * sizes.matrices // num_owners))
    parts = owned if is_sharded else owned * num_owners
    return max(5 * owned, owned + (2 if is_sharded else 1) * parts if num_owners > 1 else 0)


def _ddp_layout(config: TrainConfig, sizes: ModelSizes, bf16: bool, has_early_gradients: bool) -> _Layout:
    """Everything whole, in fp32; DDP's buckets keep the gradients. What is recomputed is cast again."""
    engine = config.engine
    num_checkpointed = -(-sizes.num_layers // engine.activation_checkpointing_every)
    if engine.activation_checkpointing is ActivationCheckpointing.none:
        num_checkpointed = 0
    num_cast = min(sizes.num_layers - num_checkpointed + 1, sizes.num_layers)
    moments, whole, trained = _moment_bytes(config.optimizer, sizes), 4 * sizes.total, 4 * sizes.trained
    return _Layout(
        state={"parameters": whole, "gradients": trained, "optimizer moments": moments},
        early_gradients=trained if has_early_gradients else 0,
        gathered=2 * (sizes.root + num_cast * sizes.block) if bf16 else 0,
        backward=4 * min(sizes.root, sizes.trained),  # a tied embedding's gradient waits for its second half
    )


def _fsdp_layout(config: TrainConfig, sizes: ModelSizes, num_shards: int, accumulates: bool, bf16: bool) -> _Layout:
    """Shards of fp32 parameters, gradients and moments; a few blocks at a time are gathered, in the compute dtype."""
    shard = -(-sizes.total // num_shards)
    element = 2 if bf16 else 4
    moments = -(-_moment_bytes(config.optimizer, sizes) // num_shards)
    state = {"parameters": 4 * shard, "gradients": 4 * -(-sizes.trained // num_shards), "optimizer moments": moments}
    host, here = (state, {}) if config.engine.offload is Offload.cpu else ({}, dict(state))
    if accumulates and config.engine.fsdp.accumulate_whole_gradients:
        here["gradients"] = 4 * sizes.trained
    num_gathered = (
        1 + config.engine.fsdp.prefetch_blocks if config.engine.fsdp.reshard_after_forward else sizes.num_layers
    )
    largest = max(sizes.root, sizes.block)
    return _Layout(
        state=here,
        early_gradients=here.get("gradients", 0) if accumulates else 0,
        gathered=element * (sizes.root + min(num_gathered, sizes.num_layers) * sizes.block),
        # A group's gradient, and in fp32 to be reduced; or what is being gathered, before it is copied to its place.
        backward=max(element * largest, (element + 4) * min(largest, sizes.trained)),
        host=host,
    )


def _zero12_layout(
    config: TrainConfig, sizes: ModelSizes, dp_size: int, accumulates: bool, bf16: bool, device_type: str
) -> _Layout:
    """Whole fp32 parameters, and the rank's part of masters, moments and (stage 2) gradients."""
    part = -(-sizes.trained // dp_size)
    stage2 = config.engine.kind is EngineKind.zero2
    moments = -(-_moment_bytes(config.optimizer, sizes) // dp_size)
    state = {"gradients": 4 * part, "master weights": 4 * part, "optimizer moments": moments}
    offload = config.engine.offload is Offload.cpu
    here = {"parameters": 4 * sizes.total} | ({} if offload else state)
    if not stage2:
        here["gradients"] = 4 * sizes.trained
    # A bucket, what is being reduced of it, and a second bucket where communication overlaps.
    num_buckets = 3 if device_type == "cuda" else 2
    return _Layout(
        state=here,
        early_gradients=here.get("gradients", 0) if accumulates else 0,
        gathered=_autocast_copies(sizes, bf16),
        backward=num_buckets * _bucket_bytes(config, sizes) + 4 * sizes.root,
        update=0 if offload else 4 * part * (1 if stage2 else 2),
        # A pinned copy of the parameters is where they are sent back from.
        host={**state, "engine buffers": 4 * part} if offload else {},
    )


def _zero3_layout(config: TrainConfig, sizes: ModelSizes, dp_size: int, bf16: bool) -> _Layout:
    """The rank's part of everything; gathered fp32 parameters stay while no more than a limit are live."""
    part = -(-sizes.trained // dp_size)
    offload = config.engine.offload is Offload.cpu
    moments = -(-_moment_bytes(config.optimizer, sizes) // dp_size)
    state = {"parameters": 4 * -(-sizes.total // dp_size), "gradients": 4 * part, "master weights": 4 * part}
    state["optimizer moments"] = moments
    live = min(sizes.total, max(ZERO3_LIVE_PARAMETERS, sizes.root + 2 * sizes.block)) if dp_size > 1 else 0
    return _Layout(
        state={} if offload else state,
        early_gradients=0 if offload else state["gradients"],
        gathered=4 * live + _autocast_copies(sizes, bf16),
        backward=2 * _bucket_bytes(config, sizes) + 4 * sizes.root,
        update=0 if offload else 4 * min(part, ZERO3_LIVE_PARAMETERS),
        host={**state, "gradients": 8 * part} if offload else {},
    )


def _autocast_copies(sizes: ModelSizes, bf16: bool) -> int:
    """Return the bytes of the bf16 copies of all weights, which autocast caches until the forward pass ends."""
    return 2 * sizes.total if bf16 else 0


def _bucket_bytes(config: TrainConfig, sizes: ModelSizes) -> int:
    return 4 * min(config.engine.deepspeed.bucket_elements, sizes.total)
