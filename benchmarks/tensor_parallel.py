"""What explicit collectives cost beside DTensor and beside a loop by hand, and what they send.

    OMP_NUM_THREADS=1 python benchmarks/tensor_parallel.py
    OMP_NUM_THREADS=1 python benchmarks/tensor_parallel.py --width 64 --heads 4

Three sides train one Llama-shaped model on two ranks that share its matrices, in turns: bigtrain's engine; the same cut
model in a loop as one would write it; and torch's ``parallelize_module`` with ``loss_parallel``, for which q, k and v are
three layers and the logits are whole. The losses of the last step prove that all did the same work. Before that the
messages and bytes of one step are counted and held against the formula.
"""

import argparse
import statistics
from collections import Counter
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from turns import Pacer, machine, take_turns

from bigtrain.config import EngineConfig, EngineKind, ModelConfig, ParallelConfig, Precision, TrainConfig
from bigtrain.config.check import resolve
from bigtrain.config.convert import from_dict
from bigtrain.data.read.batch import Batch
from bigtrain.distributed.collectives import init_process_group, pick_device
from bigtrain.engine import exchange
from bigtrain.engine.base import Engine
from bigtrain.engine.build import build_engine
from bigtrain.engine.state import initialise
from bigtrain.engine.wrap import materialise
from bigtrain.models import build_model, initial_values
from bigtrain.models.partition import cut
from bigtrain.models.rope import rope_table, rotate
from bigtrain.models.transformer import Attention, Linear, Transformer
from bigtrain.processes import RankInfo
from bigtrain.testing.ranks import run_ranks

RANKS, LR, TURNS, TURN_STEPS = 2, 1e-5, 12, 5


class Separate(nn.Module):
    """Attention with a layer each for q, k and v, which DTensor can cut."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.head_dim = attention.head_dim
        weights = attention.qkv.weight.split(attention.qkv.fused_rows)
        self.q, self.k, self.v = (_layer(weight) for weight in weights)
        self.out = attention.out

    def forward(self, x: Tensor, rope: Tensor, *others: object) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q, self.k, self.v))
        heads = (t.transpose(1, 2) for t in (rotate(q, rope), rotate(k, rope), v))
        y = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2))


class ByDTensor(nn.Module):
    """A whole Transformer, to be cut by DTensor; the loss is of whole logits."""

    def __init__(self, model: Transformer, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.blocks, self.final_norm = config, model.blocks, model.final_norm
        for block in self.blocks:
            block.attention = Separate(block.attention)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.embed_tokens.weight = nn.Parameter(model.embed_tokens.weight.detach())
        self.output = _layer(model.output.weight)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x, rope = self.embed_tokens(tokens), rope_table(self.config, torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x, rope)
        logits = self.output(self.final_norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def cut(self, mesh: DeviceMesh) -> None:
        tokens = Shard(1)
        plan: dict[str, Any] = {
            "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens),
            "final_norm": SequenceParallel(),
            "output": ColwiseParallel(input_layouts=tokens, output_layouts=Shard(-1), use_local_output=False),
        }
        for number in range(len(self.blocks)):
            at = f"blocks.{number}."
            whole = PrepareModuleInput(
                input_layouts=(tokens, *3 * [None]), desired_input_layouts=(Replicate(), *3 * [None])
            )
            plan |= {at + name: SequenceParallel() for name in ("attention_norm", "feed_forward_norm")}
            plan |= {f"{at}attention": whole}
            plan |= {f"{at}feed_forward": PrepareModuleInput(input_layouts=tokens, desired_input_layouts=Replicate())}
            columns = ("attention.q", "attention.k", "attention.v", "feed_forward.gate", "feed_forward.up")
            plan |= {at + name: ColwiseParallel() for name in columns}
            plan |= {
                at + name: RowwiseParallel(output_layouts=tokens) for name in ("attention.out", "feed_forward.down")
            }
        parallelize_module(self, mesh, plan)


def _layer(weight: Tensor) -> nn.Module:
    layer = Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    return layer


def configured(args: argparse.Namespace) -> TrainConfig:
    shape = {
        "num_layers": args.layers,
        "hidden_dim": args.width,
        "num_heads": args.heads,
        "num_kv_heads": args.heads // 2,
    }
    shape |= {"vocab_size": 512, "max_positions": args.length, "ffn_dim": 5 * args.width // 2}
    llama = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tie_embeddings": False}
    config = TrainConfig(
        model=from_dict(ModelConfig, shape | llama),
        engine=EngineConfig(kind=EngineKind.ddp, precision=Precision.fp32),
        parallel=ParallelConfig(tp=RANKS),
    )
    config.train.micro_batch_size = config.train.global_batch_size = args.batch
    return resolve(config)


def started(config: TrainConfig) -> tuple[Batch, int]:
    """Begin a process group; return the batch of every step, and its targets."""
    info = RankInfo.from_env()
    init_process_group(info, pick_device(info))
    generator = torch.Generator().manual_seed(0)
    shape = config.train.global_batch_size, config.data.sequence_length
    tokens, targets = (torch.randint(config.model.vocab_size, shape, generator=generator) for _ in range(2))
    return Batch(tokens=tokens, targets=targets), targets.numel()


def _engine(config: TrainConfig) -> Engine:
    info = RankInfo.from_env()
    engine = build_engine(config, lambda: build_model(config.model), info=info, device=pick_device(info))
    with torch.device("meta"):
        values = initial_values(build_model(config.model), config.model, 0)
    initialise(engine.state, values, num_threads=1)
    return engine


STEPS = TURNS * (1 + TURN_STEPS)


def ours(pacer: Pacer, config: TrainConfig) -> float:
    """Train by bigtrain's engine; return the last loss."""
    batch, num_targets = started(config)
    engine = _engine(config)
    pacer.begin()
    for _ in range(STEPS):
        loss = engine.forward_backward([batch], num_targets=num_targets)
        engine.step(LR)
        pacer.step_done()
    return loss.item() / num_targets


def by_hand(pacer: Pacer, config: TrainConfig) -> float:
    """Train the same cut model in a loop of its own; return the last loss."""
    batch, num_targets = started(config)
    group = dist.new_group(list(range(RANKS)))
    with torch.device("meta"):
        model = build_model(config.model)
    cut(model, exchange.TensorExchange(group))
    materialise(model, torch.device("cpu"))
    copy_weights(_engine(config), model)
    whole = [p for name, p in model.named_parameters() if name not in model.cuts]
    shared = [p for name, p in model.named_parameters() if name in model.cuts]
    optimizer = adamw(config, model)
    pacer.begin()
    for _ in range(STEPS):
        loss = model(*batch.values())
        (loss / num_targets).backward()
        exchange.add_up((p.grad for p in whole), group, torch.device("cpu"))
        squares = torch.stack(torch._foreach_norm([p.grad for p in shared])).square().sum()
        dist.all_reduce(squares, group=group)
        squares += torch.stack(torch._foreach_norm([p.grad for p in whole])).square().sum()
        torch.nn.utils.clip_grads_with_norm_([*whole, *shared], config.optimizer.grad_clip, squares.sqrt())
        optimizer.step()
        optimizer.zero_grad()
        pacer.step_done()
    return loss.item() / num_targets


def by_dtensor(pacer: Pacer, config: TrainConfig) -> float:
    """Train a model that ``parallelize_module`` has cut; return the last loss."""
    batch, num_targets = started(config)
    whole = build_model(config.model)
    with torch.device("meta"):
        values = initial_values(build_model(config.model), config.model, 0)
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            flat = torch.empty(parameter.numel())
            values[name].fill(0, flat)
            parameter.copy_(flat.view_as(parameter))
    model = ByDTensor(whole, config.model)
    model.cut(init_device_mesh("cpu", (RANKS,)))
    optimizer = adamw(config, model)
    pacer.begin()
    for _ in range(STEPS):
        with loss_parallel():
            loss = model(*batch.values())
            (loss / num_targets).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()], foreach=True)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.optimizer.grad_clip, norm)
        optimizer.step()
        optimizer.zero_grad()
        pacer.step_done()
    return (loss.full_tensor() if isinstance(loss, DTensor) else loss).item() / num_targets


def copy_weights(engine: Engine, model: nn.Module) -> None:
    held = {name.removeprefix("network."): p for name, p in engine.module.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(held[name])


def adamw(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim >= 2) == is_matrix], "weight_decay": decay}
        for is_matrix, decay in ((True, config.optimizer.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=tuple(config.optimizer.betas), eps=config.optimizer.eps, fused=True)


def sent(config: TrainConfig) -> Counter[str]:
    """Return how many messages of each kind a step sends, and under ``bytes`` how many a rank takes part in."""
    batch, num_targets = started(config)
    engine = _engine(config)
    counts: Counter[str] = Counter()

    def counted(kind: str, call: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            counts[kind] += 1
            counts["bytes"] += max(x.nbytes for x in args if isinstance(x, Tensor))
            return call(*args, **kwargs)

        return counting

    with (
        mock.patch.object(exchange, "_all_gather", counted("all-gather", exchange._all_gather)),
        mock.patch.object(exchange, "_reduce_scatter", counted("reduce-scatter", exchange._reduce_scatter)),
        mock.patch.object(dist, "all_reduce", counted("all-reduce", dist.all_reduce)),
    ):
        engine.forward_backward([batch], num_targets=num_targets)
        engine.step(LR)
    return counts


def formula(config: TrainConfig) -> Counter[str]:
    """Return the same from shapes: two exchanges a block and direction, one before and one after all blocks.

    An all-gather of the forward pass is a reduce-scatter of the backward pass and the other way around. All-reduces are
    two of the loss (a number, then two, for each token), which has one chunk here, one of the norms' gradients, one of
    the squares.
    """
    model, tokens = config.model, config.train.micro_batch_size * config.data.sequence_length
    exchanges = 2 * (2 * model.num_layers + 1)
    norms = (2 * model.num_layers + 1) * model.hidden_dim
    num_bytes = 4 * (2 * exchanges * tokens * model.hidden_dim + 3 * tokens + norms + 1)
    return Counter({"all-gather": exchanges, "reduce-scatter": exchanges, "all-reduce": 4, "bytes": num_bytes})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("width", 256), ("heads", 8), ("length", 64), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    config = configured(parser.parse_args())
    counts, expected = run_ranks(sent, RANKS, config)[0], formula(config)
    print(f"messages and bytes of a step: {dict(counts)}; by the formula {dict(expected)}")
    assert counts == expected
    sides = {side.__name__: partial(side, config=config) for side in (ours, by_hand, by_dtensor)}
    measured, failed = take_turns(sides, world_size=RANKS, threads=1, num_turns=TURNS, turn_steps=TURN_STEPS)
    assert not failed, failed
    losses = {name: side.results[0] for name, side in measured.items()}
    assert max(losses.values()) - min(losses.values()) <= 1e-5 * max(losses.values()), losses
    print(f"{config.model.num_layers} blocks of width {config.model.hidden_dim}, {RANKS} ranks; {machine()}")
    for name, other in (("DTensor / bigtrain", ("by_dtensor", "ours")), ("bigtrain / by hand", ("ours", "by_hand"))):
        a, b = (measured[side].cpu_seconds for side in other)
        low, middle, high = statistics.quantiles([x / y for x, y in zip(a, b, strict=True)], n=4)
        print(f"CPU time of a step, {name:<20} median {middle:.3f}, quartiles {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
