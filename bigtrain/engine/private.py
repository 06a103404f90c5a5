"""``ddp`` with differential privacy: DP-SGD (Abadi et al., 2016, arXiv 1607.00133), a sample at a time."""

from collections.abc import Sequence

import torch

from bigtrain.config import Precision, TrainConfig
from bigtrain.data.read.batch import Batch
from bigtrain.data.read.loader import count_targets
from bigtrain.distributed.collectives import all_reduce_sum
from bigtrain.distributed.mesh import Mesh
from bigtrain.engine.native import NativeEngine
from bigtrain.models.init import Normal
from bigtrain.optim.build import build_optimizer, parameter_groups
from bigtrain.tasks.base import TaskModel, canonical_name, gradient_scale, loss_of, sums_of


class PrivateEngine(NativeEngine):
    """A module on every rank whose gradient is the mean over the samples of a step of their clipped gradients, and noise.

    The gradient of a sample is that of the mean loss over its own targets, so that it depends on no other sample.
    """

    def __init__(self, module: TaskModel, config: TrainConfig, mesh: Mesh, device: torch.device) -> None:
        groups = parameter_groups(module.named_parameters(), config.optimizer)
        super().__init__(
            module,
            build_optimizer(groups, config.optimizer),
            mesh=mesh,
            device=device,
            grad_clip=config.optimizer.grad_clip,
            autocast=config.engine.precision.base is Precision.bf16,
        )
        self._privacy, self._seed = config.privacy, config.train.seed
        self._batch_size = config.train.global_batch_size
        self._trained = {canonical_name(name): p for name, p in module.named_parameters() if p.requires_grad}

    def forward_backward(self, micro_batches: Sequence[Batch], *, num_targets: torch.Tensor | int) -> torch.Tensor:
        self.module.train()
        for parameter in self._trained.values():
            parameter.grad = torch.zeros_like(parameter)
        samples = (sample for micro_batch in micro_batches for sample in micro_batch.split(1))
        total = torch.stack([self._add_clipped(sample) for sample in samples]).sum(dim=0)
        for parameter in self._trained.values():
            all_reduce_sum(parameter.grad).div_(self._batch_size)
        return total

    def _add_clipped(self, sample: Batch) -> torch.Tensor:
        """Add the gradient of one sample, of norm ``privacy.max_grad_norm`` at most, and return its sums."""
        num_targets, parameters = count_targets(self.objective, sample), list(self._trained.values())
        with self.autocast():
            sums = sums_of(self.module, sample.to(self.device))
        loss = loss_of(sums)
        # What padding is made of has no target, and no gradient either.
        scaled = loss * gradient_scale(loss, 1 / (num_targets or 1))
        found = torch.autograd.grad(scaled, parameters, allow_unused=True)
        pairs = [(p.grad, gradient) for p, gradient in zip(parameters, found, strict=True) if gradient is not None]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for _, gradient in pairs]))
        factor = (self._privacy.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for own, gradient in pairs:
            own.add_(gradient * factor)
        return sums.detach()

    @torch.no_grad()
    def begin_update(self, step: int) -> None:
        std = self._privacy.noise_multiplier * self._privacy.max_grad_norm / self._batch_size
        for name, parameter in self._trained.items() if std else ():
            noise = torch.empty(parameter.numel())
            Normal(std, self._seed, f"noise of step {step} {name}").fill(0, noise)
            parameter.grad += noise.view(parameter.shape).to(parameter.device)
