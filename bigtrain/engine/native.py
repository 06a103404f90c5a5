"""``ddp``, ``fsdp`` and ``hsdp``: torch's own data parallelism and sharding."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parallel import DistributedDataParallel

from bigtrain.config import EngineConfig, EngineKind, Offload, Precision, TrainConfig
from bigtrain.data.read.batch import Batch
from bigtrain.distributed.collectives import local_part
from bigtrain.distributed.mesh import Mesh
from bigtrain.engine.base import Engine
from bigtrain.engine.exchange import add_up
from bigtrain.engine.state import MODEL, OPTIMIZER, Box, Entry, create_optimizer_state, in_whole, whole_entry
from bigtrain.engine.wrap import find_blocks, materialise, wrap_blocks
from bigtrain.models.moe import Experts
from bigtrain.models.partition import Cut, cuts_of
from bigtrain.optim.build import build_optimizer, parameter_groups, set_lr
from bigtrain.tasks.base import TaskModel, canonical_name, gradient_scale, loss_of, sums_of


class NativeEngine(Engine):
    """A module wrapped by DDP or FSDP2, or not at all, with an optimizer of torch's."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        mesh: Mesh,
        device: torch.device,
        grad_clip: float,
        autocast: bool,
        accumulate_whole_gradients: bool = False,
        keep_gradients: bool = False,
    ) -> None:
        self.module, self.optimizer = module, optimizer
        self.device, self.mesh = device, mesh
        self.grad_clip = grad_clip
        self._is_bf16 = autocast
        self.keep_gradients = keep_gradients
        self.accumulate_whole_gradients = accumulate_whole_gradients
        self._parameters = list(module.parameters())  # to walk the modules for them takes longer than to clip them
        self.shard_group = mesh.state
        # Under FSDP every rank holds them, and the first one of a shard group counts them in the norm.
        self._scalars = {p for p in self._parameters if isinstance(module, FSDPModule) and not p.ndim}
        self._uncounted = set(self._scalars) if mesh.ranks["dp_shard"].get_local_rank() else set()
        # DDP averages gradients over the ranks, which this factor turns into the sum; FSDP is told to sum.
        self.averages_over = mesh.num_replicas if isinstance(module, DistributedDataParallel) else 1
        self._communicates_as_last: bool | None = None
        # A sum of two is the same in any order, and only DDP has buckets.
        self._has_final_buckets = not isinstance(module, DistributedDataParallel) or mesh.num_replicas <= 2
        create_optimizer_state(optimizer)
        self.state = state = NativeState(module, optimizer, mesh)
        shares_experts = mesh.experts is not None and mesh.experts.get_local_rank("ep") > 0
        if shares_experts and not isinstance(module, FSDPModule):
            self._uncounted |= {p for name, p in state.parameters.items() if name not in state.cuts}
        if mesh.tp_rank:  # what is whole on all ranks that share matrices, the first one counts
            self._uncounted |= {p for name, p in state.parameters.items() if name not in state.cuts}

    def backward(self, batch: Batch, num_targets: torch.Tensor | int, *, is_last: bool) -> torch.Tensor:
        if not self._has_final_buckets:
            self._settle_buckets(batch)
        with self._communicate(last=is_last):
            with self.autocast():
                sums = sums_of(self.module, batch)
            sums.backward(gradient_scale(sums, self.averages_over / num_targets))
        for scalar in self._scalars if is_last else ():
            if scalar.grad is not None:
                dist.all_reduce(scalar.grad)
        return sums

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        # Each weight is cast once per forward pass anyway, and cached copies would outlive checkpointed blocks.
        device_type, bf16 = self.device.type, torch.bfloat16
        return torch.autocast(device_type, bf16, cache_enabled=False) if self._is_bf16 else contextlib.nullcontext()

    def step(self, lr: float) -> torch.Tensor:
        parameters = [p for p in self._parameters if p.grad is not None]
        gradients = [local_part(p.grad) for p in parameters]
        norm = self._global_norm([g for p, g in zip(parameters, gradients, strict=True) if p not in self._uncounted])
        if self.grad_clip and gradients:
            factor = (norm + 1e-6).reciprocal_().mul_(self.grad_clip).clamp_(max=1.0)
            torch._foreach_mul_(gradients, factor.to(gradients[0].device))  # offloaded ones are on the host
        set_lr(self.optimizer, lr)
        update_unless_bad(self.optimizer, norm, ask_host=self._parameters[0].device.type == "cpu")
        if self.balance:
            self.balance.update(norm)
        self._forget_gradients()
        return norm

    def _forget_gradients(self) -> None:
        if self.keep_gradients:
            self.optimizer.zero_grad(set_to_none=False)
        else:  # what zero_grad() does, without its record for the profiler
            for parameter in self._parameters:
                parameter.grad = None

    def _global_norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """Return the 2-norm of all gradients on all ranks.

        Norms of rows first: on a CPU, torch adds up a whole tensor in one fp32 sum, which is wrong by
        1e-5 for a large one and depends on how it is sharded. On a GPU it adds up in a tree, all tensors in one kernel.
        """
        gradients = [g for g in gradients if g.numel()]
        if gradients and gradients[0].is_cuda:
            norms = list(torch._foreach_norm(gradients, 2, torch.float32))
        else:
            rows = [torch.linalg.vector_norm(g.reshape(-1, g.shape[-1] if g.ndim else 1), dim=-1) for g in gradients]
            norms = [torch.linalg.vector_norm(row) for row in rows]
        total = torch.stack(norms).square().sum().to(self.device) if norms else torch.zeros((), device=self.device)
        if self.shard_group is not None:
            dist.all_reduce(total, group=self.shard_group)
        return total.sqrt()

    def forward_backward(self, micro_batches: Sequence[Batch], *, num_targets: torch.Tensor | int) -> torch.Tensor:
        sums = super().forward_backward(micro_batches, num_targets=num_targets)
        if self.mesh.experts is not None and not isinstance(self.module, FSDPModule):
            gradients = dict(self.state.gradients())
            of_experts = [gradient for name, gradient in gradients.items() if name in self.state.cuts]
            others = [gradient for name, gradient in gradients.items() if name not in self.state.cuts]
            add_up(of_experts, self.mesh.experts.get_group("replicate"), self.device)
            add_up(others, self.mesh.ranks.get_group("dp_replicate"), self.device)
        return sums

    def _settle_buckets(self, batch: Batch) -> None:
        """Run a backward pass that counts for nothing, before the first one that counts.

        After its first backward pass DDP sorts the gradients into other buckets, by when they were ready, and the
        place in a bucket decides in which order the ranks' shares are added up. So the first step after a
        resume would be rounded differently from the same step of the uninterrupted run.
        """
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []), self.autocast():
            loss_of(sums_of(self.module, batch)).backward()
        self._forget_gradients()
        self._has_final_buckets = True

    def _communicate(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Communicate gradients in the backward pass of the last micro-batch only, unless that costs too much memory."""
        if isinstance(self.module, FSDPModule):
            if last != self._communicates_as_last:  # each of these walks through all modules
                self.module.set_requires_gradient_sync(last or not self.accumulate_whole_gradients)
                # Under hsdp the sum over replicas can always wait: what waits is sharded.
                self.module.set_requires_all_reduce(last)
                self.module.set_is_last_backward(last)
                self._communicates_as_last = last
        elif isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return contextlib.nullcontext()


def update_unless_bad(optimizer: torch.optim.Optimizer, norm: torch.Tensor, *, ask_host: bool) -> None:
    """Let the optimizer update its weights, unless the gradient's norm, a 0-d tensor, is not finite.

    The host decides with ``ask_host``, as it has to where the weights are on the host: the kernel there would read a
    GPU's number before it has come; and for SGD, whose kernels for sharded parameters are not fused. On a GPU the host
    would have to wait; a fused kernel looks at the number, as it does for gradient scalers.
    """
    if ask_host or not getattr(optimizer, "_step_supports_amp_scaling", False):
        if math.isfinite(norm.item()):
            optimizer.step()
        return
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]  # which gradient scalers set
    optimizer.step()


class NativeState:
    """The state of DDP (whole tensors) and FSDP2 (DTensors). See :class:`bigtrain.engine.state.EngineState`."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh) -> None:
        self.entries: dict[str, Entry] = {}
        self.cuts = cuts_of(module)
        self.holders: dict[str, torch.Tensor] = {}
        self._units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
        self.parameters = {canonical_name(name): parameter for name, parameter in module.named_parameters()}
        for name, parameter in self.parameters.items():
            self.entries[MODEL + name] = _entry(parameter, mesh, self.cuts.get(name))
            if not parameter.requires_grad:
                continue
            self.holders[name] = parameter
            for key, value in optimizer.state[parameter].items():
                cut = self.cuts.get(name) if value.shape == parameter.shape else None
                self.entries[f"{OPTIMIZER}{name}.{key}"] = _entry(value, mesh, cut)

    def commit(self) -> None:
        """Let go of gathered copies, which an evaluation leaves; the boxes are views of the parameters themselves."""
        for unit in self._units:
            unit.reshard()

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, local_part(p.grad)) for name, p in self.parameters.items() if p.grad is not None)


def _entry(tensor: torch.Tensor, mesh: Mesh, cut: Cut | None) -> Entry:
    entry = _sharded_entry(tensor) if isinstance(tensor, DTensor) else None
    if entry is None:
        replica, num_replicas = mesh.replica_of(is_expert=cut is not None)
        entry = whole_entry(tensor, replica=replica, num_replicas=num_replicas)
    return in_whole(entry, cut, rank=mesh.tp_rank, size=mesh.tp_size)


def _sharded_entry(tensor: DTensor) -> Entry:
    shape, local = tuple(tensor.shape), tensor.to_local().detach()
    _, offsets = compute_local_shape_and_global_offset(shape, tensor.device_mesh, tensor.placements)
    boxes = (Box(tuple(offsets), local),) if local.numel() else ()
    replica, num_replicas = 0, 1
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            size = tensor.device_mesh.size(dimension)
            replica = replica * size + tensor.device_mesh.get_local_rank(dimension)
            num_replicas *= size
    return Entry(shape, tensor.dtype, boxes, replica, num_replicas)


def build_native(
    build_model: Callable[[], TaskModel],
    config: TrainConfig,
    *,
    mesh: Mesh,
    device: torch.device,
    wrap: Callable[[nn.Module], DistributedDataParallel] | None = None,
) -> NativeEngine:
    """Build the model on the meta device, shard or ``wrap`` it (by default in DDP), materialise it; weights are garbage."""
    engine, accumulates = config.engine, config.train.micro_batches(mesh.dp_size) > 1
    is_sharded = engine.kind in (EngineKind.fsdp, EngineKind.hsdp)
    with torch.device("meta"):
        model = build_model()
    wrap_blocks(model, engine)
    if is_sharded:
        fully_shard_blocks(model, engine, mesh)
    module: nn.Module = model
    materialise(module, torch.device("cpu") if engine.offload is Offload.cpu else device, buffers=device)
    # A world of one has nothing to exchange; buckets would only hold its gradients from step to step. Of experts that
    # are shared out, other ranks hold copies than of all else.
    if not is_sharded and mesh.experts is None and (wrap or mesh.num_replicas > 1):
        for parameter in module.parameters():
            # Of these DDP makes views of its buckets. Gradients that wait for more micro-batches would else lie outside.
            if accumulates and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        module = parallel = wrap(module) if wrap else _data_parallel(module, mesh, device)
        parallel.broadcast_buffers = False  # all ranks compute tables alike; the argument's name depends on the version
    return NativeEngine(
        module,
        build_optimizer(parameter_groups(module.named_parameters(), config.optimizer), config.optimizer),
        mesh=mesh,
        device=device,
        grad_clip=config.optimizer.grad_clip,
        autocast=not is_sharded and engine.precision.base is Precision.bf16,
        accumulate_whole_gradients=engine.fsdp.accumulate_whole_gradients,
        keep_gradients=isinstance(module, DistributedDataParallel) and accumulates,
    )


def _data_parallel(model: nn.Module, mesh: Mesh, device: torch.device) -> DistributedDataParallel:
    device_ids = [device.index] if device.type == "cuda" else None
    group = mesh.ranks.get_group("dp_replicate") if mesh.tp_size > 1 else None
    # init_sync would broadcast weights that are overwritten right afterwards.
    return DistributedDataParallel(
        model, device_ids=device_ids, process_group=group, gradient_as_bucket_view=True, init_sync=False
    )


def fully_shard_blocks(model: TaskModel, engine: EngineConfig, mesh: Mesh) -> None:
    """Shard a model on the meta device, each block by itself, over the ranks that the engine's kind says."""
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)  # rotary tables stay fp32
    if engine.precision.base is Precision.bf16:
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=mesh.ranks.device_type == "cuda")
    shard = partial(
        fully_shard,
        mesh=mesh.ranks["dp_replicate", "dp_shard"] if engine.kind is EngineKind.hsdp else mesh.ranks["dp_shard"],
        mp_policy=precision,
        offload_policy=offload if engine.offload is Offload.cpu else OffloadPolicy(),
        ignored_params={parameter for parameter in model.parameters() if not parameter.ndim},  # there are no rows
    )
    units: list[FSDPModule] = []
    if mesh.experts is not None:
        is_hybrid = engine.kind is EngineKind.hsdp
        holders = mesh.experts["replicate", "efsdp"] if is_hybrid else mesh.experts["efsdp"]
        reshard = engine.fsdp.reshard_after_forward
        experts = [module for module in model.modules() if isinstance(module, Experts)]
        units += [shard(module, mesh=holders, reshard_after_forward=reshard) for module in experts]
    # FSDP2 ties parameters within one unit only: blocks that share some (Zamba's transformer) stay in the root's.
    blocks = find_blocks(model)
    uses = Counter(parameter for block in blocks for parameter in block.parameters())
    alone = [block for block in blocks if all(uses[parameter] == 1 for parameter in block.parameters())]
    first = len(units)
    for i, block in enumerate(alone, start=1):
        # The backward pass begins with the last block: to reshard it would be to gather it again at once.
        reshard = engine.fsdp.reshard_after_forward and i < len(alone)
        units.append(shard(block, reshard_after_forward=reshard))
    if (num_ahead := engine.fsdp.prefetch_blocks) > 1:  # one is what FSDP2 does by itself
        in_turn = units[first:]
        for i, unit in enumerate(in_turn):
            unit.set_modules_to_forward_prefetch(in_turn[i + 1 : i + 1 + num_ahead])
            unit.set_modules_to_backward_prefetch(in_turn[max(i - num_ahead, 0) : i][::-1])
    # So does what the root itself holds, the head; embeddings in a unit of their own would be out of reach of a head that
    # is tied to them, and of models that use their weights elsewhere.
    units.append(shard(model, reshard_after_forward=False))
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # by a factor gloo cannot multiply, not even by 1
