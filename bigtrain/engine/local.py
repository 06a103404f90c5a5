"""``ddp`` with local steps: workers train by themselves, and average their weights every so many steps.

With an outer learning rate of 1 that is FedAvg (McMahan et al. 2017, arXiv 1602.05629, whose clients have the same number
of samples here), with Nesterov momentum DiLoCo (Douillard et al. 2023, arXiv 2311.08105, algorithm 1).
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from bigtrain.config import Precision, TrainConfig
from bigtrain.data.read.batch import Batch
from bigtrain.distributed.collectives import all_reduce_sum
from bigtrain.distributed.mesh import Mesh
from bigtrain.engine.exchange import add_up
from bigtrain.engine.native import NativeEngine
from bigtrain.engine.state import MODEL, OPTIMIZER, Box, Entry, whole_entry
from bigtrain.models.partition import Cut
from bigtrain.optim.build import build_optimizer, parameter_groups, set_lr
from bigtrain.tasks.base import TaskModel, canonical_name, gradient_scale, loss_of, sums_of


class LocalEngine(NativeEngine):
    """The weights of this rank's workers, stacked, beside those that all agreed on last."""

    def __init__(self, module: TaskModel, config: TrainConfig, mesh: Mesh, device: torch.device) -> None:
        self._sync, self._num_own = config.sync, config.sync.workers // mesh.size
        self._trained = {canonical_name(name): p for name, p in module.named_parameters() if p.requires_grad}
        self._stacked = {
            name: nn.Parameter(p.detach().new_zeros(self._num_own, *p.shape)) for name, p in self._trained.items()
        }
        by_parameter = {p: self._stacked[name] for name, p in self._trained.items()}
        groups = parameter_groups(module.named_parameters(), config.optimizer)  # by their own shapes
        groups = [{**group, "params": [by_parameter[p] for p in group["params"]]} for group in groups]
        super().__init__(
            module,
            build_optimizer(groups, config.optimizer),
            mesh=mesh,
            device=device,
            grad_clip=config.optimizer.grad_clip,
            autocast=config.engine.precision.base is Precision.bf16,
        )
        agreed = {name: p.detach().clone() for name, p in self._trained.items()}
        self.state = self.agreement = LocalState(self, agreed, config.sync.workers)
        self._step = 0
        self._bytes = sum(4 * p.numel() for p in self._trained.values())  # of the weights, or of their gradient

    def begin_update(self, step: int) -> None:
        self._step = step

    def _as(self, weights: Mapping[str, torch.Tensor], worker: int | None = None) -> None:
        """Let the module compute with some weights, of a worker where they are stacked."""
        for name, parameter in self._trained.items():
            parameter.data = weights[name].detach() if worker is None else weights[name].detach()[worker]

    def forward_backward(self, micro_batches: Sequence[Batch], *, num_targets: torch.Tensor | int) -> torch.Tensor:
        self.module.train()
        each, total = len(micro_batches) // self._num_own, None
        scale = self._sync.workers / num_targets
        for stacked in self._stacked.values():
            stacked.grad = torch.zeros_like(stacked)
        for worker in range(self._num_own):
            self._as(self._stacked, worker)
            for micro_batch in micro_batches[worker * each : (worker + 1) * each]:
                with self.autocast():
                    sums = sums_of(self.module, micro_batch.to(self.device))
                loss_of(sums).backward(gradient_scale(loss_of(sums), scale))
                total = sums.detach() if total is None else total + sums.detach()
            for name, parameter in self._trained.items():
                if parameter.grad is not None:
                    self._stacked[name].grad[worker] = parameter.grad
                parameter.grad = None
        assert total is not None
        return total

    @torch.no_grad()
    def step(self, lr: float) -> torch.Tensor:
        """Clip and update each worker by itself; the norm is the root of the mean of their squares."""
        squares = []
        for worker in range(self._num_own):
            gradients = [stacked.grad[worker] for stacked in self._stacked.values()]
            norms = [
                torch.linalg.vector_norm(torch.linalg.vector_norm(g.reshape(len(g) if g.ndim else 1, -1), dim=-1))
                for g in gradients
            ]
            norm = torch.linalg.vector_norm(torch.stack(norms))
            if self.grad_clip:
                torch._foreach_mul_(gradients, (self.grad_clip / (norm + 1e-6)).clamp(max=1.0))
            squares.append(norm.square())
        norm = (all_reduce_sum(torch.stack(squares).sum()) / self._sync.workers).sqrt()
        set_lr(self.optimizer, lr)
        if torch.isfinite(norm):
            self.optimizer.step()
        if (self._step + 1) % self._sync.every_steps == 0:
            self._synchronise()
        return norm

    def _synchronise(self) -> None:
        """Step from the weights that all agreed on towards the workers' mean, and let all go on from there."""
        momentum, agreed = self._sync.outer_momentum, self.agreement.agreed
        means = {name: stacked.detach().sum(0) for name, stacked in self._stacked.items()}
        if self.mesh.size > 1:
            add_up(means.values(), dist.group.WORLD, self.device)
        for name, weight in agreed.items():
            change = weight - means[name] / self._sync.workers
            if momentum:
                outer = self.agreement.momentum[name].mul_(momentum).add_(change)
                change = change + momentum * outer
            weight.sub_(change, alpha=self._sync.outer_lr)
            self._stacked[name].detach().copy_(weight)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> torch.Tensor:
        self._as(self.agreement.agreed)
        return super().evaluate(micro_batches)

    @property
    def averaged_bytes(self) -> tuple[int, int]:
        num_steps, num_averages = self._step + 1, (self._step + 1) // self._sync.every_steps
        return num_averages * self._bytes, (num_steps - num_averages) * self._bytes


class LocalState:
    """``model.<name>`` are the weights that all agreed on; what each worker has is stacked in the optimizer's state."""

    def __init__(self, engine: LocalEngine, agreed: dict[str, torch.Tensor], num_workers: int) -> None:
        self.agreed, self._engine = agreed, engine
        outer = agreed if engine._sync.outer_momentum else {}
        self.momentum = {name: torch.zeros_like(weight) for name, weight in outer.items()}
        self.entries: dict[str, Entry] = {}
        self.holders: dict[str, torch.Tensor] = dict(agreed)
        self.cuts: dict[str, Cut] = {}
        mesh, first = engine.mesh, engine.mesh.rank * engine._num_own

        def stacked(tensor: torch.Tensor) -> Entry:
            box = Box((first, *(0 for _ in tensor.shape[1:])), tensor.detach())
            return Entry((num_workers, *tensor.shape[1:]), tensor.dtype, (box,))

        def whole(tensor: torch.Tensor) -> Entry:
            return whole_entry(tensor, replica=mesh.rank, num_replicas=mesh.size)

        for raw, parameter in engine.module.named_parameters():
            name = canonical_name(raw)
            self.entries[MODEL + name] = whole(agreed.get(name, parameter))
            if name not in agreed:
                continue
            own = engine._stacked[name]
            self.entries[f"{OPTIMIZER}{name}.local"] = stacked(own)
            if engine._sync.outer_momentum:
                self.entries[f"{OPTIMIZER}{name}.outer"] = whole(self.momentum[name])
            for key, value in engine.optimizer.state[own].items():
                self.entries[f"{OPTIMIZER}{name}.{key}"] = stacked(value) if value.shape == own.shape else whole(value)

    def commit(self) -> None:
        """Let workers that have not begun, whose weights are all 0, begin from what all agreed on."""
        own = self._engine._stacked
        if not any(stacked.any() for stacked in own.values()):
            for name, stacked in own.items():
                stacked.detach().copy_(self.agreed[name])

    def gradients(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(())
