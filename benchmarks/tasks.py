"""Does a run of another task have the losses of transformers' Trainer, and how many samples a second do both make?

    python benchmarks/tasks.py
    python benchmarks/tasks.py --only 'T5, sequence to sequence' --engine zero3
    OMP_NUM_THREADS=1 python benchmarks/tasks.py --speed

Losses: small networks of transformers in fp32 without dropout, 20 steps from the same weights on the same samples in
the same order, with AdamW at a constant rate. Ours is on two ranks in micro-batches of 2; Trainer has the whole batch
of 8 at once, where its mean is the mean over the step, and then two micro-batches of 4, where it is not.

Speed: larger networks, one process and one micro-batch each, both in processes of their own that take turns. Trainer
gets samples that are masked and padded already.
"""

import argparse
import os
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

# Ranks are forked from a server that is not started in this directory, but has to find these modules.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])

import task_sides
import turns
from small_runs import call
from task_sides import BATCH, CASES, STEPS, WORLD_SIZE

from bigtrain.config import EngineKind
from bigtrain.errors import ConfigError

TOLERANCE = 1e-4
Figures = dict[str, dict[str, Any]]


def difference(ours: list[float], theirs: list[float]) -> float:
    """Return the largest difference of the losses of a step."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def compare_losses(name: str, engine: EngineKind) -> dict[str, Any]:
    """Return our losses, and Trainer's with one and with two micro-batches a step.

    Raises:
        ConfigError: a side is refused.
    """
    with tempfile.TemporaryDirectory(prefix="tasks-") as temporary:
        directory = Path(temporary)
        sides = {
            "prepared": (task_sides.prepare, 1, name, directory),
            "ours": (task_sides.our_losses, WORLD_SIZE, name, directory, engine),
            "trainer": (task_sides.their_losses, 1, name, directory, 1),
            "trainer, 2 micro-batches": (task_sides.their_losses, 1, name, directory, 2),
        }
        found = {}
        for side, (function, world_size, *args) in sides.items():
            found[side], refusal = call(function, world_size, *args)
            if refusal:
                raise ConfigError(f"{name}, {side}: {refusal}")
    del found["prepared"]
    return found


def compare_speed(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return samples per second of both sides, and the quartiles of the ratio of neighbouring turns."""
    steps = (1 + args.turns) * (1 + args.steps)
    given = [f"train.steps={steps}", f"train.micro_batch_size={BATCH}", "engine=ddp", "train.log_every_steps=10"]
    with tempfile.TemporaryDirectory(prefix="tasks-") as temporary:
        directory = Path(temporary)
        _, refusal = call(partial(task_sides.prepare, larger=True), 1, name, directory)
        if refusal:
            raise ConfigError(refusal)
        sides = {"ours": task_sides.our_turns, "trainer": task_sides.their_turns}
        measured, failures = turns.take_turns(
            {side: partial(function, name, directory, given) for side, function in sides.items()},
            world_size=1,
            threads=args.threads,
            num_turns=1 + args.turns,
            turn_steps=args.steps,
        )
    if failures:
        sys.exit("\n".join(failures.values()))
    seconds = {side: found.seconds for side, found in measured.items()}
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["trainer"], strict=True)]
    rates = {side: BATCH / statistics.median(values) for side, values in seconds.items()}
    return {"samples_per_second": rates, "ratio": turns.quartiles(ratios), "seconds_per_step": seconds}


def print_losses(wanted: list[str], engine: EngineKind) -> Figures:
    """Print and return a row per case."""
    print(f"{'':<28}{'loss 1':>9}{f'loss {STEPS}':>9}{'Trainer':>10}{'2 micro-batches':>17}{'its loss 1':>12}")
    rows = {}
    for name in wanted:
        rows[name] = found = compare_losses(name, engine)
        cut = found["trainer, 2 micro-batches"]
        found["difference"] = difference(found["ours"], found["trainer"])
        found["difference, 2 micro-batches"] = difference(found["ours"], cut)
        print(
            f"{name:<28}{found['ours'][0]:>9.4f}{found['ours'][-1]:>9.4f}{found['difference']:>10.1e}"
            f"{found['difference, 2 micro-batches']:>17.1e}{cut[0]:>12.4f}",
            flush=True,
        )
    return rows


def print_speeds(wanted: list[str], args: argparse.Namespace) -> Figures:
    """Print and return a row per case that has a larger network."""
    print(f"{turns.machine()}; {turns.versions('transformers')}; 1 x {args.threads} threads, {BATCH} samples per step")
    print(f"{'':<28}{'ours/s':>9}{'Trainer/s':>11}{'ratio':>8}{'quartiles':>16}")
    rows = {}
    for name in wanted:
        if CASES[name].larger is None:
            continue
        rows[name] = found = compare_speed(name, args)
        rates, (low, middle, high) = found["samples_per_second"], found["ratio"]
        quartiles = f"{low:.3f} - {high:.3f}"
        print(f"{name:<28}{rates['ours']:>9.2f}{rates['trainer']:>11.2f}{middle:>7.3f}x{quartiles:>16}", flush=True)
    return rows


def main() -> int:
    """Print the table that is asked for; return 0 if all losses agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument(
        "--engine", default="fsdp", choices=[engine.name for engine in EngineKind], help="of the losses"
    )
    parser.add_argument("--speed", action="store_true", help="measure the speed instead")
    parser.add_argument("--turns", type=int, default=8, help="of each side, after one to warm up (default 8)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a turn (default 4)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side; by default the cores")
    turns.add_json_argument(parser)
    args = parser.parse_args()
    rows = print_speeds(args.only, args) if args.speed else print_losses(args.only, EngineKind[args.engine])
    turns.write_json(args.json, "tasks, speed" if args.speed else "tasks, losses", rows=rows)
    return 0 if args.speed else int(any(not row["difference"] <= TOLERANCE for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
