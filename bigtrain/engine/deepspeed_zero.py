"""``zero1``, ``zero2`` and ``zero3``: DeepSpeed. The only importer of deepspeed.

DeepSpeed's own mixed precision keeps bf16 parameters beside fp32 masters that start from rounded weights, and
accumulates gradients in bf16 unless told otherwise. Its ``torch_autocast`` with fp32 communication has neither fault,
computes what DDP under autocast computes, and leaves one memory layout to know for fp32 and bf16.
"""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from bigtrain.config import EngineKind, Offload, Precision, TrainConfig
from bigtrain.data.read.batch import Batch
from bigtrain.distributed.mesh import Mesh
from bigtrain.engine.base import Engine
from bigtrain.engine.state import (
    MODEL,
    OPTIMIZER,
    Box,
    Entry,
    create_optimizer_state,
    flat_boxes,
    in_whole,
    whole_entry,
)
from bigtrain.engine.wrap import materialise, wrap_blocks
from bigtrain.errors import ConfigError, of_all_ranks
from bigtrain.models.partition import Cut, cuts_of
from bigtrain.optim.build import build_optimizer, parameter_groups, set_lr
from bigtrain.processes import RankInfo
from bigtrain.tasks.base import TaskModel, canonical_name, gradient_scale, loss_of, sums_of

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

STAGES = {EngineKind.zero1: 1, EngineKind.zero2: 2, EngineKind.zero3: 3}


class _Place(NamedTuple):
    """What this rank holds of a parameter: a range of its elements in row-major order."""

    holder: torch.Tensor  # flat, with other parameters
    begin: int  # first element of the range in the holder
    start: int  # first element of the range in the whole parameter
    numel: int  # elements of the range; 0 if this rank holds nothing


class ZeroEngine(Engine):
    """A module and an optimizer within a ``DeepSpeedEngine``."""

    module: "DeepSpeedEngine"

    def __init__(self, module: "DeepSpeedEngine", *, mesh: Mesh, device: torch.device) -> None:
        self.module = module
        self.optimizer: torch.optim.Optimizer = module.optimizer.optimizer
        self.device = device
        self.mesh, self.averages_over = mesh, mesh.dp_size
        if module.zero_optimization_stage() == 3:
            hide_gathering(module)
            self.state = Zero3State(module, mesh)
        else:
            self.state = Zero12State(module, mesh)

    def forward_backward(self, micro_batches: Sequence[Batch], *, num_targets: torch.Tensor | int) -> torch.Tensor:
        self.module.train()  # the engine's own flag stays when eval() turns off that of the model
        return super().forward_backward(micro_batches, num_targets=num_targets)

    def backward(self, batch: Batch, num_targets: torch.Tensor | int, *, is_last: bool) -> torch.Tensor:
        self.module.set_gradient_accumulation_boundary(is_last)
        sums = sums_of(self.module, batch)
        loss = loss_of(sums)
        # DeepSpeed averages over the ranks, which the factor dp_size undoes, and would divide by the number of
        # accumulation steps, which scale_wrt_gas=False switches off.
        scale = gradient_scale(loss, self.averages_over / num_targets)
        try:
            self.module.backward(loss * scale, scale_wrt_gas=False)
        except RuntimeError as error:
            if "size of tensor a (0) must match" not in str(error):  # a partition that is gone, in place of a weight
                raise
            problem = "DeepSpeed lets go of weights of this model before their gradients are there; use fsdp or zero2"
            raise of_all_ranks(ConfigError(f"engine=zero3: {problem}")) from error
        return sums

    def step(self, lr: float) -> torch.Tensor:
        # DeepSpeed clips, and leaves out bad steps, inside its own step.
        set_lr(self.module.optimizer, lr)
        self.module.step()
        norm = torch.as_tensor(self.module.get_global_grad_norm(), device=self.device)
        if self.balance:
            self.balance.update(norm)
        return norm


class Zero12State:
    """Stages 1 and 2: each rank owns one flat range of every parameter group."""

    def __init__(self, module: "DeepSpeedEngine", mesh: Mesh) -> None:
        self._zero = module.optimizer
        self.cuts = cuts_of(module)
        create_optimizer_state(self._zero.optimizer)
        self._names = {parameter: canonical_name(name) for name, parameter in module.module.named_parameters()}
        self.entries: dict[str, Entry] = {}
        self.holders: dict[str, torch.Tensor] = {}
        for parameter, name in self._names.items():
            if not parameter.requires_grad:
                entry = whole_entry(parameter, replica=mesh.dp_rank, num_replicas=mesh.dp_size)
                self.entries[MODEL + name] = in_whole(entry, self.cuts.get(name), rank=mesh.tp_rank, size=mesh.tp_size)
        for group in range(len(self._zero.bit16_groups)):
            flat = self._zero.single_partition_of_fp32_groups[group]
            for parameter, start, begin, end in self._slices(group, flat.numel()):
                name, place = self._names[parameter], _Place(flat, begin, start, end - begin)
                self.holders[name] = flat
                state, cut = self._zero.optimizer.state[flat], self.cuts.get(name)
                self.entries |= _entries(name, tuple(parameter.shape), place, state, mesh, cut)

    def _slices(self, group: int, partition_numel: int) -> Iterator[tuple[nn.Parameter, int, int, int]]:
        """Yield (parameter, first element held, begin, end), by address: DeepSpeed orders parameters in its own way."""
        group_flat = self._zero.bit16_groups_flat[group]
        first = dist.get_rank(self._zero.real_dp_process_group[group]) * partition_numel
        for parameter in self._zero.bit16_groups[group]:
            offset = (parameter.data_ptr() - group_flat.data_ptr()) // parameter.element_size()
            begin = max(offset, first)
            end = max(min(offset + parameter.numel(), first + partition_numel), begin)
            yield parameter, begin - offset, begin - first, end - first

    def commit(self) -> None:
        """Refresh the parameters that the model computes with from the masters."""
        self._zero.update_lp_params()

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        for group, flat in enumerate(self._zero.single_partition_of_fp32_groups):
            if self._zero.cpu_offload:
                for parameter, _, begin, end in self._slices(group, flat.numel()):
                    yield self._names[parameter], flat.grad[begin:end]
                continue
            # The partition in order, with padding between, as DeepSpeed's own norm reads it.
            parts = [part for part in self._zero.averaged_gradients[group] if not getattr(part, "_zero_padding", False)]
            parameters = self._zero.params_in_partition[group]
            yield from ((self._names[p], part) for p, part in zip(parameters, parts, strict=False))


class Zero3State:
    """Stage 3: every parameter is cut into equal flat parts, padded at the end."""

    def __init__(self, module: "DeepSpeedEngine", mesh: Mesh) -> None:
        self._zero = module.optimizer
        self._names = {parameter: canonical_name(name) for name, parameter in module.module.named_parameters()}
        self.entries: dict[str, Entry] = {}
        self.cuts: dict[str, Cut] = {}
        self.holders: dict[str, torch.Tensor] = {}

        def add(parameter: Any, holder: torch.Tensor, begin: int, state: dict[str, torch.Tensor]) -> None:
            start = dist.get_rank(parameter.ds_process_group) * parameter.partition_numel()
            numel = max(0, min(parameter.partition_numel(), parameter.ds_numel - start))
            place, shape = _Place(holder, begin, start, numel), tuple(parameter.ds_shape)
            self.entries |= _entries(self._names[parameter], shape, place, state, mesh)

        for parameter in self._names:
            if not parameter.requires_grad:
                add(parameter, parameter.ds_tensor, 0, {})
        for i, (parameters, flat) in enumerate(
            zip(self._zero.fp16_groups, self._zero.fp32_partitioned_groups_flat, strict=True)
        ):
            # Between steps DeepSpeed empties the groups of the optimizer that it drives.
            group = self._zero.optimizer.param_groups[self._zero.sub_group_to_group_id[i]]
            group["params"] = [flat]
            create_optimizer_state(self._zero.optimizer)
            group["params"] = []
            offset = 0
            for parameter in parameters:
                self.holders[self._names[parameter]] = flat
                add(parameter, flat, offset, self._zero.optimizer.state[flat])
                offset += parameter.partition_numel()

    def commit(self) -> None:
        """Refresh the partitioned parameters from the masters, and gather the small ones that stay gathered."""
        self._zero.checkpoint_event_prologue()
        for i in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(i)
        self._zero.checkpoint_event_epilogue()

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        parts = self._zero.get_fp32_grad_partitions()
        for i, parameters in enumerate(self._zero.fp16_groups):
            for j, parameter in enumerate(parameters):
                start = dist.get_rank(parameter.ds_process_group) * parameter.partition_numel()
                yield self._names[parameter], parts[i][j][: max(0, parameter.ds_numel - start)]


def _entries(
    name: str,
    shape: tuple[int, ...],
    place: _Place,
    state: dict[str, torch.Tensor],
    mesh: Mesh,
    cut: Cut | None = None,
) -> Iterator[tuple[str, Entry]]:
    """Yield key and entry of the master weight and the optimizer state at the place of a parameter."""
    flat, end = place.holder.detach(), place.begin + place.numel

    def part_of(values: torch.Tensor) -> Entry:
        entry = Entry(shape, values.dtype, flat_boxes(shape, place.start, values[place.begin : end]))
        return in_whole(entry, cut, rank=mesh.tp_rank, size=mesh.tp_size)

    yield MODEL + name, part_of(flat)
    for key, value in state.items():
        if value.shape == flat.shape:
            entry = part_of(value)
        else:  # one number for the whole group, such as the step
            entry = Entry((), value.dtype, (Box((), value),), mesh.rank, mesh.size)
        yield f"{OPTIMIZER}{name}.{key}", entry


def build_deepspeed(
    build_model: Callable[[], TaskModel], config: TrainConfig, *, info: RankInfo, mesh: Mesh, device: torch.device
) -> ZeroEngine:
    """Build the model (partitioned from the start with stage 3) and hand it to DeepSpeed; weights are garbage."""
    deepspeed = import_deepspeed(info, device)
    settings = deepspeed_settings(config, dp_size=mesh.dp_size, device=device)
    model, optimizer = build_for_deepspeed(deepspeed, build_model, config, settings=settings, device=device)
    for name, parameter in model.named_parameters():
        if canonical_name(name) in cuts_of(model):  # of others DeepSpeed counts the first rank's in the norm
            parameter.model_parallel = True  # type: ignore[attr-defined]
    mpu = _ModelParallel(mesh) if mesh.tp_size > 1 else None
    module, _, _, _ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, dist_init_required=False, mpu=mpu
    )
    return ZeroEngine(module, mesh=mesh, device=device)


class _ModelParallel:
    """What DeepSpeed asks an ``mpu``: which ranks share the matrices, and which load different samples."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.tp

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tp_size

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tp_rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.mesh.ranks.get_group("dp_shard")

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.dp_size

    def get_data_parallel_rank(self) -> int:
        return self.mesh.dp_rank


def build_for_deepspeed(
    deepspeed: Any,
    build_model: Callable[[], TaskModel],
    config: TrainConfig,
    *,
    settings: dict[str, Any],
    device: torch.device,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return model and optimizer as ``deepspeed.initialize`` wants them."""
    with torch.device("meta"):
        model = build_model()
    wrap_blocks(model, config.engine)
    if config.engine.kind is EngineKind.zero3:
        _partition(deepspeed, model, settings, device)
        for module in model.modules():
            if hasattr(module, "experts"):  # so transformers calls them; which are run depends on a rank's tokens,
                deepspeed.utils.set_z3_leaf_module(module, True)  # and all ranks have to gather the same
    else:
        materialise(model, device)
        for scalar in (p for p in model.parameters() if not p.ndim):
            # Keeps DeepSpeed from its broadcast of garbage, for which it would view the number as bytes.
            scalar.ds_optim_param = True  # type: ignore[attr-defined]
    return model, build_optimizer(parameter_groups(model.named_parameters(), config.optimizer), config.optimizer)


def _partition(deepspeed: Any, model: nn.Module, settings: dict[str, Any], device: torch.device) -> None:
    """Give the parameters memory one at a time, each cut into this rank's part before the next one.

    To build the model within ``zero.Init`` would let its own initialisation code meet parameters that are cut already.
    """
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings)
    parts: dict[nn.Parameter, nn.Parameter] = {}
    for owner in model.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in parts:
                memory = torch.empty_like(torch.atleast_1d(parameter), device=device)
                part: Any = nn.Parameter(memory, parameter.requires_grad)
                init._convert_to_zero_parameters([part])
                part.ds_shape = parameter.shape  # also where it has no dimension, which DeepSpeed cannot cut
                parts[parameter] = part
            setattr(owner, name, parts[parameter])
        for name, buffer in owner.named_buffers(recurse=False):
            setattr(owner, name, buffer.to(device))


def hide_gathering(module: "DeepSpeedEngine") -> None:
    """Keep ZeRO-3's gathering of parameters out of sight of selective activation checkpointing.

    That records every operation of a block's forward and expects the same ones when the block is
    recomputed, when other parameters happen to be gathered already.
    """

    def hidden(function: Callable[..., Any], *args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    hooks = module.optimizer.parameter_offload
    for name in ("pre_sub_module_forward_function", "post_sub_module_forward_function"):
        setattr(hooks, name, partial(hidden, getattr(hooks, name)))


def import_deepspeed(info: RankInfo, device: torch.device) -> Any:
    """Import DeepSpeed, quietly, for ``device``."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    info.publish()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed still calls names that torch has deprecated, once per step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|torch\.distributed)\b")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if device.type == "cpu":
        # The op is an all-reduce for inference; building it takes minutes and a killed build blocks all later ones.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)
    return deepspeed


def deepspeed_settings(config: TrainConfig, *, dp_size: int, device: torch.device) -> dict[str, Any]:
    """Return DeepSpeed's own configuration, derived from ours."""
    engine, train = config.engine, config.train
    offload = {"device": "cpu", "pin_memory": device.type == "cuda"} if engine.offload is Offload.cpu else None
    zero: dict[str, Any] = {
        "stage": STAGES[engine.kind],
        "reduce_bucket_size": engine.deepspeed.bucket_elements,
        "allgather_bucket_size": engine.deepspeed.bucket_elements,
        "overlap_comm": device.type == "cuda",
        "stage3_param_persistence_threshold": engine.deepspeed.persistence_threshold_elements,
        # DeepSpeed would replace F.linear in the whole process and change the numbers of bf16.
        "memory_efficient_linear": False,
    }
    if offload:
        zero["offload_optimizer"] = offload
        if engine.kind is EngineKind.zero3:
            zero["offload_param"] = offload
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.micro_batches(dp_size),
        "gradient_clipping": config.optimizer.grad_clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": engine.precision.base is Precision.bf16,
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "timers": {"throughput": {"enabled": False}},  # it synchronises the device twice per micro-batch
        "steps_per_print": 2**62,
    }
