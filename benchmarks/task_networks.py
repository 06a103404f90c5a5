"""Twenty networks of transformers for other tasks, in small: trained, stopped, continued elsewhere, exported, opened.

    OMP_NUM_THREADS=1 python benchmarks/task_networks.py --only bert whisper
    OMP_NUM_THREADS=1 python benchmarks/task_networks.py --json networks.json       goes on where it was interrupted

Each from a ``config.json`` alone, in fp32 without dropout, on two ranks, 3 steps of 7 samples with ragged counts:

- losses under ``fsdp``, against one process under ``ddp``;
- losses of a run that stops after 2 steps under ``zero3`` and goes on under ``fsdp`` on 3 ranks, against the same;
- outputs of an export of the latter, opened by transformers, against those of its checkpoint.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# Ranks are forked from a server that is not started in this directory, but has to find these modules.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])

import network_checks as checks
from families import attempt, relative_difference

TOLERANCE = 1e-5
CHECKS = ("fsdp", "zero3, then fsdp", "export")


def examine(architecture: str) -> dict[str, Any]:
    """Return the differences of an architecture, and what is refused or fails, by check."""
    figures: dict[str, Any] = {"refused": {}, "failed": {}}
    with tempfile.TemporaryDirectory(prefix=f"{architecture}-") as temporary:
        directory = Path(temporary)
        given = (architecture, directory)
        attempt(figures, directory, "build", checks.prepare, 1, *given)
        right = attempt(figures, directory, "one process", checks.train, 1, *given, "ddp", "whole")
        if right is None:
            return figures
        stop = f"run.stop_after_steps={checks.STOPPED}"
        whole = attempt(figures, directory, "fsdp", checks.train, 2, *given, "fsdp", "fsdp")
        attempt(figures, directory, "zero3", checks.train, 2, *given, "zero3", "parts", stop)
        parts = attempt(figures, directory, "zero3, then fsdp", checks.train, 3, *given, "fsdp", "parts")
        for name, losses in (("fsdp", whole), ("zero3, then fsdp", parts)):
            if losses is not None:
                figures[name] = relative_difference(losses, right)
        opened = attempt(figures, directory, "export", checks.compare_export, 1, *given, "parts")
        figures |= {} if opened is None else {"export": opened}
    return figures


def is_equal(figures: dict[str, Any]) -> bool:
    """Return whether all checks were made and found no difference."""
    return all(figures.get(check, 1.0) <= TOLERANCE for check in CHECKS)


def main() -> int:
    """Examine the networks that are asked for and print a row of Markdown for each; return 0 if all are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(checks.NETWORKS), choices=list(checks.NETWORKS))
    parser.add_argument("--json", type=Path, help="keeps the figures; what is in it already is not computed again")
    args = parser.parse_args()
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    print("| network | kind | samples | fsdp | zero3, then fsdp | export |\n| --- | --- | --- | --- | --- | --- |")
    for architecture in args.only:
        kind, samples, _ = checks.NETWORKS[architecture]
        if architecture not in results:
            results[architecture] = examine(architecture)
        found = results[architecture]
        cells = [f"{found[check]:.0e}" if check in found else "-" for check in CHECKS]
        print(f"| {' | '.join([architecture, kind, samples, *cells])} |", flush=True)
        for what, told in {**found["refused"], **found["failed"]}.items():
            print(f"  {architecture}, {what}: {told}", file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(not all(is_equal(results[architecture]) for architecture in args.only))


if __name__ == "__main__":
    sys.exit(main())
