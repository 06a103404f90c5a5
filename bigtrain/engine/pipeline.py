"""``parallel.pp``: ranks have some blocks each, and the micro-batches of a step go through them one after the other.

Every rank of a pipeline loads the same samples; between stages only hidden states and their gradients are sent. The order
of a step is that of ``torch.distributed.pipelining``, which this module alone imports; an evaluation is a loop of its own.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleInterleaved1F1B

from bigtrain.config import EngineKind, Precision, TrainConfig
from bigtrain.data.read.batch import Batch
from bigtrain.distributed.collectives import broadcast_json, gather_json, local_part
from bigtrain.distributed.mesh import Mesh
from bigtrain.engine.exchange import add_up
from bigtrain.engine.native import NativeEngine, fully_shard_blocks
from bigtrain.engine.state import MODEL, OPTIMIZER, EngineState, Entry
from bigtrain.engine.wrap import materialise, wrap_blocks
from bigtrain.models.partition import take_stage
from bigtrain.models.transformer import Transformer
from bigtrain.optim.build import build_optimizer, parameter_groups
from bigtrain.tasks.base import Objective, TaskModel, canonical_name, gradient_scale

TIED = "embed_tokens.weight"


class Stage(TaskModel):
    """Some blocks of a network, in a pipeline."""

    def __init__(self, network: nn.Module, objective: Objective, *, is_first: bool, is_last: bool, bf16: bool) -> None:
        super().__init__(network, objective)
        self.is_first, self.is_last, self.bf16 = is_first, is_last, bf16

    def forward(self, x: Tensor, **batch: Tensor) -> Tensor:  # type: ignore[override]
        """Return the hidden states for the next stage, or the last one's sums; ``x`` are those before, or tokens."""
        network: Any = self.network if self.is_first else partial(self.network, hidden_BTD=x)
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False, enabled=self.bf16):
            if self.is_last:
                return self.objective(network, *batch.values())
            return network(*batch.values()).contiguous()


class PipelineEngine(NativeEngine):
    """This rank's stages, with their optimizer."""

    def __init__(self, stages: dict[int, Stage], config: TrainConfig, names: list[str], **settings: Any) -> None:
        """Build the schedule of a step; ``names`` are those of the whole model's parameters, in order."""
        module = nn.ModuleDict({f"stage{number}": stage for number, stage in stages.items()})
        named = list(module.named_parameters())
        optimizer = build_optimizer(parameter_groups(named, config.optimizer), config.optimizer)
        super().__init__(module, optimizer, grad_clip=config.optimizer.grad_clip, autocast=False, **settings)
        self.stages, self._config = stages, config
        self._is_sharded = config.engine.kind is not EngineKind.ddp
        bf16 = config.engine.precision.base is Precision.bf16
        self._dtype = torch.bfloat16 if self._is_sharded and bf16 else torch.float32  # of hidden states
        self._num_stages = config.parallel.num_stages
        self._scale: Tensor | float = 1.0
        self._sums: list[Tensor] = []
        parameters = {canonical_name(name): parameter for name, parameter in named}
        is_last = self._num_stages - 1 in stages
        self._tied = parameters.get(TIED) if config.model.tie_embeddings and (0 in stages or is_last) else None
        if self._tied is not None:
            share_tied(self.state, is_last=is_last)
            self._uncounted |= {self._tied} if is_last else set()
        complete(self.state, names)
        self._schedule = self._build_schedule()

    def _build_schedule(self) -> Any:
        config = self._config
        size, length = config.train.micro_batch_size, config.data.sequence_length
        hidden = self._hidden(size, length, "meta").requires_grad_()
        tokens = torch.empty(size, length, dtype=torch.int64, device="meta")
        loss = torch.empty((), device="meta", requires_grad=True)
        stages: list[Any] = [
            PipelineStage(
                stage,
                number,
                self._num_stages,
                self.device,
                input_args=tokens if stage.is_first else hidden,
                output_args=loss if stage.is_last else hidden,
                group=self.mesh.pp,
            )
            for number, stage in self.stages.items()
        ]
        settings: dict[str, Any] = {"n_microbatches": config.train.micro_batches(self.mesh.dp_size)}
        settings |= {"loss_fn": self._loss, "scale_grads": False}
        if len(stages) == 1:
            return Schedule1F1B(stages[0], **settings)
        return ScheduleInterleaved1F1B(stages, **settings)

    def _hidden(self, size: int, length: int, device: torch.device | str) -> Tensor:
        """Return memory for what a stage sends of ``size`` sequences, of which a rank may have some tokens."""
        own = length // (self.mesh.copies // self.mesh.pp_size)
        return torch.empty(size, own, self._config.model.hidden_dim, dtype=self._dtype, device=device)

    def _loss(self, sums: Tensor, _: Tensor) -> Tensor:
        self._sums.append(sums.detach())
        return sums * gradient_scale(sums, self._scale)

    def forward_backward(self, micro_batches: Sequence[Batch], *, num_targets: Tensor | int) -> Tensor:
        if not self.module.training:
            self.module.train()
        whole = {name: torch.cat([batch[name] for batch in micro_batches]).to(self.device) for name in micro_batches[0]}
        self._scale, self._sums = 1 / num_targets, []
        is_first, is_last = 0 in self.stages, self._num_stages - 1 in self.stages
        target = {"target": whole["targets"]} if is_last else {}
        self._schedule.step(*([whole["tokens"]] if is_first else []), **target, return_outputs=False, **whole)
        self._finish()
        return self.mesh.of_sequences(reduce(torch.add, self._sums) if is_last else torch.zeros((), device=self.device))

    def _finish(self) -> None:
        """Sum gradients over the ranks that have seen other samples, other tokens, or the other use of tied rows."""
        if not self._is_sharded and self.mesh.num_replicas > 1:
            gradients = (gradient for _, gradient in self.state.gradients())
            add_up(gradients, self.mesh.ranks.get_group("dp_replicate"), self.device)
        self.sum_whole()
        if self._tied is not None:
            own = local_part(self._tied.grad)
            distance = (self.mesh.pp_size - 1) * (self.mesh.size // self.mesh.pp_size)
            peer = self.mesh.rank + (distance if self.mesh.pp_rank == 0 else -distance)
            other, mine = torch.empty_like(own), own.contiguous()
            for work in dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, mine, peer), dist.P2POp(dist.irecv, other, peer)]
            ):
                work.wait()
            own.add_(other)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> Tensor:
        self.module.eval()
        sums, stage_size = torch.zeros(len(micro_batches), 1, device=self.device), self.mesh.size // self.mesh.pp_size
        place = self.mesh.rank % stage_size
        for number, batch in enumerate(batch.to(self.device) for batch in micro_batches):
            for at, stage in self.stages.items():
                x = batch["tokens"]
                if not stage.is_first:
                    x = self._hidden(x.shape[0], x.shape[1], self.device)
                    dist.recv(x, (at - 1) % self.mesh.pp_size * stage_size + place)
                found = stage(x, **batch)
                if stage.is_last:
                    sums[number] = found
                else:
                    dist.send(found, (at + 1) % self.mesh.pp_size * stage_size + place)
        return self.mesh.of_sequences(sums)


def share_tied(state: EngineState, *, is_last: bool) -> None:
    """Let the entries of tied embeddings, which the first stage and the last hold, be copies of each other."""
    for key, entry in state.entries.items():
        if _name_of(key) == TIED:
            number = entry.num_replicas
            state.entries[key] = dataclasses.replace(
                entry, replica=entry.replica + number * is_last, num_replicas=2 * number
            )


def complete(state: EngineState, names: list[str]) -> None:
    """Give a rank entries without boxes of what other stages hold, all in the order of ``names``; all ranks call this."""
    own = {key: [list(entry.shape), str(entry.dtype).removeprefix("torch.")] for key, entry in state.entries.items()}
    everyone: dict[str, Any] = broadcast_json(reduce(lambda a, b: {**a, **b}, gather_json(own), {}))
    place = {name: number for number, name in enumerate(names)}
    empty = {key: Entry(tuple(shape), getattr(torch, dtype), ()) for key, (shape, dtype) in everyone.items()}
    state.entries = {
        key: state.entries.get(key, empty[key]) for key in sorted(empty, key=lambda key: place[_name_of(key)])
    }


def _name_of(key: str) -> str:
    return key.removeprefix(OPTIMIZER).rpartition(".")[0] if key.startswith(OPTIMIZER) else key.removeprefix(MODEL)


def build_pipeline(
    build_model: Callable[[], TaskModel], config: TrainConfig, *, mesh: Mesh, device: torch.device
) -> PipelineEngine:
    """Build this rank's stages; their weights are garbage."""
    engine, parallel = config.engine, config.parallel
    is_sharded = engine.kind is not EngineKind.ddp
    bf16 = engine.precision.base is Precision.bf16 and not is_sharded
    stages, names = {}, list[str]()
    for number in range(mesh.pp_rank, parallel.num_stages, parallel.pp):
        with torch.device("meta"):
            model = build_model()
        wrap_blocks(model, engine)
        names = [canonical_name(name) for name, _ in model.named_parameters()]
        assert isinstance(model.network, Transformer)
        take_stage(model.network, number, parallel.num_stages)
        is_last = number == parallel.num_stages - 1
        stage = Stage(model.network, model.objective, is_first=number == 0, is_last=is_last, bf16=bf16)
        if is_sharded:
            fully_shard_blocks(stage, engine, mesh)
        materialise(stage, device, buffers=device)
        stages[number] = stage
    return PipelineEngine(stages, config, names, mesh=mesh, device=device)
