"""Is every task, under every engine and world size, killed and continued elsewhere, the run of one process?

    OMP_NUM_THREADS=1 python benchmarks/task_matrix.py --json matrix.json                   all: an hour or two
    OMP_NUM_THREADS=1 python benchmarks/task_matrix.py --only masked_lm --worlds 1 3 --engines fsdp zero3

Small networks in fp32 and samples with ragged counts, 6 steps of 7 samples. Each cell's run has a checkpoint of step 4,
is killed (SIGKILL) in step 5 and continued by the next engine of the list on the next number of ranks. Compared with one
process under ``ddp``: losses and metrics of all steps and validations, up to the kill and after it, and the digest of
the samples; apart from these the gradient norms, which rounding moves more than losses. With ``--json`` the same command
goes on where it was interrupted.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# Ranks are forked from a server that is not started in this directory, but has to find these modules.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])

from small_runs import call
from small_tasks import write_samples
from task_cells import SAVED, TASKS, killed_run, read_records, whole_run, write_scores

from bigtrain.testing.ranks import RankFailedError

ENGINES, WORLDS = ("ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3"), (1, 2, 3, 4)
BOUNDS = {"before": 1e-5, "after": 1e-6, "norms": 1e-5}
"""Largest relative differences of a cell's engine, of the engine that continues, and of all gradient norms."""
NORM = "grad_norm"
REWARDED = 10.0
"""A tenth (``task.beta``) of an answer's log-probability, some 30 tokens of 4 nats: in fp32 it is rounded to 1e-6."""


def largest_difference(found: list[dict[str, Any]], right: list[dict[str, Any]], *, of_norms: bool = False) -> float:
    """Return the largest relative difference of the numbers of two lists of records; infinity for a NaN or other samples.

    Gradient norms are looked at alone, or left out. An R² near 0 is the difference of two numbers near 1, and rewards
    are those of numbers near :data:`REWARDED`: these count.
    """
    worst = 0.0
    for record, expected in zip(found, right, strict=True):
        if record.keys() != expected.keys():
            return math.inf
        for name, value in expected.items():
            if isinstance(value, str):
                worst = max(worst, 0.0 if record[name] == value else math.inf)
            elif (name == NORM) is of_norms:
                scale = 1 - value if name.endswith("r2") else value
                scale = REWARDED if name.endswith(("reward", "margin")) else scale
                difference = abs(record[name] - value) / max(abs(scale), 1e-3)
                worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst


def examine(task: str, engine: str, world_size: int, then: str, next_size: int, place: Path) -> dict[str, Any]:
    """Return the differences of a cell, or its refusal or failure."""
    name = f"{task}-{engine}-{world_size}"
    try:
        try:
            _, refusal = call(killed_run, world_size, task, place, engine, name)
            return {"refused": refusal} if refusal else {"failed": "the run was not killed"}
        except RankFailedError as error:
            if "died with exit code -9" not in str(error):
                raise
        _, refusal = call(whole_run, next_size, task, place, then, name)
    except RankFailedError as error:
        return {"failed": str(error).strip().splitlines()[-1]}
    if refusal:
        return {"failed": refusal}
    steps, right = read_records(place, name), read_records(place, task)
    if len(steps) != len(right):
        return {"failed": f"{len(steps)} records instead of {len(right)}"}
    before = [number for number, record in enumerate(right) if record["step"] <= SAVED]
    after = [number for number in range(len(right)) if number not in before]
    figures = {
        kind: largest_difference([steps[i] for i in part], [right[i] for i in part])
        for kind, part in (("before", before), ("after", after))
    }
    return figures | {"norms": largest_difference(steps, right, of_norms=True)}


def is_equal(cell: dict[str, Any]) -> bool:
    """Return whether all figures of a cell are within their bounds."""
    return all(cell.get(kind, math.inf) <= bound for kind, bound in BOUNDS.items())


def main() -> int:
    """Examine the cells that are asked for; return 0 if all are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(TASKS), choices=list(TASKS), metavar="TASK")
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--worlds", nargs="*", default=list(WORLDS), type=int)
    parser.add_argument("--json", type=Path, help="keeps the figures; what is in it already is not computed again")
    args = parser.parse_args()
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    print(f"{'task':<22}{'engine':<8}{'ranks':>5}  {'then':<14}{'before':>9}{'after':>9}{'norms':>9}")
    with tempfile.TemporaryDirectory(prefix="matrix-") as temporary:
        place = Path(temporary)
        write_samples(place)
        if "distillation" in args.only:
            call(write_scores, 1, place)
        for task in args.only:
            cells = [(engine, world) for world in args.worlds for engine in args.engines]
            missing = [cell for cell in cells if f"{task} {cell[0]} {cell[1]}" not in results]
            if missing and (refusal := call(whole_run, 1, task, place, "ddp", task)[1]):
                sys.exit(f"{task}: {refusal}")
            for engine, world_size in missing:
                then = args.engines[(args.engines.index(engine) + 2) % len(args.engines)]
                next_size = world_size % max(WORLDS) + 1
                found = examine(task, engine, world_size, then, next_size, place)
                results[f"{task} {engine} {world_size}"] = found
                told = found.get("refused") or found.get("failed")
                numbers = "" if told else "".join(f"{found[kind]:>9.1e}" for kind in BOUNDS)
                figures = told or f"{numbers}{'' if is_equal(found) else '  DIFFERS'}"
                print(f"{task:<22}{engine:<8}{world_size:>5}  {f'{then} on {next_size}':<14}{figures}", flush=True)
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(not all(is_equal(results[f"{t} {e} {w}"]) for t in args.only for w in args.worlds for e in args.engines))


if __name__ == "__main__":
    sys.exit(main())
