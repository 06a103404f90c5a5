"""Peak memory and time of the training loss, forward and backward: ``python benchmarks/loss_memory.py``.

16,384 hidden states, projected onto a vocabulary of 50,304 and compared with their targets: by ``bigtrain``'s chunks, by
``F.cross_entropy`` of all logits at once, and by torch's own ``F.linear_cross_entropy`` where it has one. Each is in a process
of its own, and they take turns; on a GPU the first two are compiled. The peak is what a step adds to the inputs and their gradients, which all need alike.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import turns
from torch import Tensor, nn
from turns import Measured, Pacer

from bigtrain.models.loss import sum_cross_entropy

OURS, PLAIN, TORCH = "bigtrain, in chunks", "F.cross_entropy of all logits", "F.linear_cross_entropy"


def plain(hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
    logits_NV = F.linear(hidden_BTD, weight_VD).flatten(0, 1).float()
    return F.cross_entropy(logits_NV, targets_BT.flatten(), reduction="sum")


def torchs_own(hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    hidden_ND, targets_N = hidden_BTD.flatten(0, 1), targets_BT.flatten()
    return F.linear_cross_entropy(hidden_ND, weight_VD, targets_N, reduction="sum", options=options)


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {OURS: sum_cross_entropy, PLAIN: plain}
if hasattr(F, "linear_cross_entropy"):
    WAYS[TORCH] = torchs_own


def side(name: str, args: argparse.Namespace, pacer: Pacer) -> tuple[float, float, int]:
    """Return the loss, the norm of the weight's gradient, and the bytes held between steps."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(args.batch, args.sequence_length, args.width, generator=generator).to(device, dtype)
    weight = (0.05 * torch.randn(args.vocabulary, args.width, generator=generator)).to(device, dtype)
    targets = torch.randint(args.vocabulary, hidden.shape[:2], generator=generator).to(device)
    hidden.requires_grad_()
    weight.requires_grad_()
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    pacer.begin()
    held = turns.peak_bytes()
    way = WAYS[name]
    if device == "cuda" and name == OURS:
        way = partial(way, compiled=True)
    elif device == "cuda" and name == PLAIN:
        way = torch.compile(way)
    for _ in range((1 + args.turns) * (1 + args.steps)):
        weight.grad.zero_()
        loss = way(hidden, weight, targets) / targets.numel()
        loss.backward()
        pacer.step_done()
    return loss.item(), weight.grad.float().norm().item(), held


def report(measured: dict[str, Measured]) -> str:
    lines = [f"{'':<32}{'seconds':>9}{'ours is':>9}{'peak MB':>10}{'ours is':>9}{'loss':>10}{'gradient':>10}"]
    seconds = {name: statistics.median(way.seconds) for name, way in measured.items()}
    peaks = {name: max(way.peak_bytes - way.results[0][2], 1) for name, way in measured.items()}
    for name, way in measured.items():
        loss, norm, _ = way.results[0]
        lines.append(
            f"{name:<32}{seconds[name]:>9.3f}{seconds[OURS] / seconds[name]:>8.3f}x{peaks[name] / 1e6:>10,.0f}"
            f"{peaks[OURS] / peaks[name]:>8.3f}x{loss:>10.5f}{norm:>10.5f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=50_304)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3, help="of every side, after one to warm up (default 3)")
    parser.add_argument("--steps", type=int, default=1, help="timed steps of a turn (default 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="by default one per core")
    turns.add_json_argument(parser)
    args = parser.parse_args()
    measured, failures = turns.take_turns(
        {name: partial(side, name, args) for name in WAYS},
        world_size=1,
        threads=args.threads,
        num_turns=1 + args.turns,
        turn_steps=args.steps,
    )
    for name, failure in failures.items():
        print(f"left out: {name} has failed: {failure.strip().splitlines()[-1]}")
    if OURS in failures or PLAIN in failures:
        sys.exit(next(iter(failures.values())))
    facts = (
        f"{turns.machine()}\n{args.batch} x {args.sequence_length} x {args.vocabulary:,}, width {args.width}, "
        f"{'bf16' if torch.cuda.device_count() else f'fp32, {args.threads} threads'}; {args.turns} turns, medians\n"
    )
    print(f"{facts}\n{report(measured)}")
    rows = {
        name: {"seconds": way.seconds, "peak_bytes": way.peak_bytes - way.results[0][2], "loss": way.results[0][0]}
        for name, way in measured.items()
    }
    turns.write_json(args.json, "loss_memory", conditions=facts, rows=rows)
    losses = [way.results[0][:2] for way in measured.values()]
    if any(abs(a - b) > 1e-2 * abs(b) for values in losses for a, b in zip(values, losses[0], strict=True)):
        sys.exit(f"other work: {losses}")


if __name__ == "__main__":
    main()
