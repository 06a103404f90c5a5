"""Faults one after the other, real restarts by torchrun, and what they cost.

    OMP_NUM_THREADS=1 python benchmarks/soak.py --faults 10
    OMP_NUM_THREADS=1 python benchmarks/soak.py --faults 1000 --ranks 2      hours

A tiny model is trained twice by the same command line: once undisturbed, and once with a fault in every
process group that torchrun starts, drawn by the seed: a rank is killed (kill -9), raises, is stopped (SIGSTOP) or
hangs in native code, in any phase of any of the next steps. Losses of all steps and the final weights have to be
equal bit by bit; then no sample was lost or repeated either, because every loss is the sum over its samples.

*Recovery* is the time from the fault to the end of the next optimizer step, *cold start* that from the
command to the end of the first one. Faults in phases before the first step count as one more start.
"""

import argparse
import ctypes
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

BEGIN = time.monotonic()  # before anything slow is imported

SCRIPT = Path(__file__).resolve()
EVERY_STEPS = 4
REACH_STEPS = 8
"""Faults come so many steps after the start of a process group at most."""
PHASES = ("starting", "data", "forward_backward", "optimizer", "logging", "checkpoint")
KINDS = {"kill": 12, "raise": 4, "stop": 2, "hang": 2}
HANG_SECONDS, FIRST_HANG_SECONDS = 5.0, 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engine", default="fsdp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(Path(args.worker), args)
        return
    with tempfile.TemporaryDirectory() as directory:
        undisturbed = launch(Path(directory) / "undisturbed", args, num_faults=0)
        disturbed = launch(Path(directory) / "disturbed", args, num_faults=args.faults)
        report(args, undisturbed, disturbed)


# One launch of torchrun


def launch(root: Path, args: argparse.Namespace, *, num_faults: int) -> dict[str, Any]:
    """Train to the end; return what happened."""
    root.mkdir()
    own = ["--faults", num_faults, "--steps", num_steps(args.faults), "--worker", root]
    own += ["--engine", args.engine, "--seed", args.seed]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    command = [*torchrun, f"--max-restarts={num_faults}", str(SCRIPT), *map(str, own)]
    begin = time.monotonic()
    with (root / "log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
    if code:
        print((root / "log").read_text()[-4000:], file=sys.stderr)
    records = [json.loads(line) for path in root.glob("*.jsonl") for line in path.read_text().splitlines()]
    records.sort(key=lambda record: record["time"])
    return {"root": root, "code": code, "begin": begin, "end": time.monotonic(), "records": records}


def num_steps(num_faults: int) -> int:
    return 4 * num_faults + 12


# In the ranks


def work(root: Path, args: argparse.Namespace) -> None:
    """Train as one rank, with the fault that is drawn for it."""
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    file = os.open(root / f"rank-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(what: str, **facts: Any) -> None:
        line = json.dumps({"what": what, "time": time.monotonic(), "rank": rank, "attempt": attempt, **facts})
        os.write(file, line.encode() + b"\n")

    note("process", begun=BEGIN)
    from bigtrain import trainer
    from bigtrain.checks import resolve
    from bigtrain.config import (
        CheckpointConfig,
        DataConfig,
        DataSource,
        EngineConfig,
        EngineKind,
        ModelConfig,
        RunConfig,
        SupervisionConfig,
        TrainConfig,
        TrainingConfig,
    )
    from bigtrain.resilience.failures import is_lost_connection
    from bigtrain.resilience.heartbeat import Heartbeat
    from bigtrain.resilience.launch import Launch

    shape = {"vocab_size": 97, "num_layers": 2, "hidden_dim": 24, "num_heads": 3, "max_positions": 16, "dropout": 0.1}
    config = TrainConfig(
        run=RunConfig(name="soak", root=str(root)),
        model=ModelConfig(name="tiny", **shape),
        data=DataConfig(source=DataSource.synthetic),
        engine=EngineConfig(kind=EngineKind[args.engine]),
        train=TrainingConfig(steps=args.steps, global_batch_size=8, micro_batch_size=2, log_every_steps=1),
        checkpoint=CheckpointConfig(every_steps=EVERY_STEPS),
        supervision=SupervisionConfig(
            hang_seconds=HANG_SECONDS, first_hang_seconds=FIRST_HANG_SECONDS, max_failed_attempts=1000
        ),
    )
    enter, supervise, fill = Heartbeat.enter, Launch.supervise, trainer.fill_state
    fault = draw(args.seed, attempt, int(os.environ["WORLD_SIZE"])) if attempt < args.faults else None
    state: dict[str, Any] = {"first": None, "since": time.monotonic(), "phase": "starting"}

    def strike(step: int, phase: str) -> None:
        if fault and fault["rank"] == rank and fault["phase"] == phase and step >= due(fault, state["first"]):
            fault["rank"] = None  # once, also when the watchdog's signal ends a hang early
            note("fault", **{**fault, "rank": rank}, step=step)
            STRIKES[fault["kind"]]()

    def watched_enter(self: Heartbeat, phase: str, step: int | None = None) -> None:
        enter(self, phase, step)
        now = time.monotonic()
        note("phase", phase=state["phase"], seconds=now - state["since"], step=self.step)
        state.update(phase=phase, since=now)
        if state["first"] is None and phase == "data":
            state["first"] = self.step - 1
        strike(self.step, phase)

    def watched_supervise(self: Launch, *options: Any) -> None:
        supervise(self, *options)
        strike(0, "starting")

    def watched_fill(*options: Any) -> int:
        begin = time.monotonic()
        step = fill(*options)
        note("restore", seconds=time.monotonic() - begin, step=step)
        return step

    Heartbeat.enter, Launch.supervise, trainer.fill_state = watched_enter, watched_supervise, watched_fill
    try:
        code = trainer.run(resolve(config))
    except Exception as error:
        code = 1
        if not is_lost_connection(error):
            raise
    sys.exit(code)


def draw(seed: int, attempt: int, num_ranks: int) -> dict[str, Any]:
    """Return the fault of a process group."""
    chance = random.Random(f"{seed}/{attempt}")
    (kind,) = chance.choices(list(KINDS), list(KINDS.values()))
    phase = chance.choice(PHASES)
    return {"kind": kind, "rank": chance.randrange(num_ranks), "phase": phase, "after": chance.randint(1, REACH_STEPS)}


def due(fault: dict[str, Any], first_step: int | None) -> int:
    """Return the step at which a fault strikes."""
    if fault["phase"] == "starting":
        return 0
    return 1 << 62 if first_step is None else first_step + fault["after"]


def _raise() -> None:
    raise ZeroDivisionError("a fault of this rank only")


STRIKES = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raise": _raise,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: ctypes.PyDLL(None).sleep(100_000),
}


# The figures


def report(args: argparse.Namespace, undisturbed: dict[str, Any], disturbed: dict[str, Any]) -> None:
    faults = [record for record in disturbed["records"] if record["what"] == "fault"]
    print(f"engine={args.engine} ranks={args.ranks}, {num_steps(args.faults)} steps, a checkpoint every {EVERY_STEPS}")
    print(f"faults {len(faults)}: {dict(Counter(fault['kind'] for fault in faults))}")
    print(f"        {dict(Counter(fault['phase'] for fault in faults))}")
    recoveries = {number: seconds for number, fault in enumerate(faults) if (seconds := recovery(disturbed, fault))}
    print(f"recovered {len(recoveries)}, unrecovered {len(faults) - len(recoveries)}, exit code {disturbed['code']}")
    same_losses = trajectory(undisturbed) == trajectory(disturbed)
    same_state = state_hashes(undisturbed) == state_hashes(disturbed)
    print(f"losses of all steps equal: {same_losses}; weights and optimizer state equal: {same_state}")
    cold = first_step_after(undisturbed, undisturbed["begin"]) - undisturbed["begin"]
    print(f"\nseconds to the next optimizer step{'':12} median   worst   over a cold start ({cold:.2f} s)")
    for kind in KINDS:
        times = [seconds for number, seconds in recoveries.items() if faults[number]["kind"] == kind]
        if times:
            median = statistics.median(times)
            print(f"  after {kind:<40}{median:6.2f}  {max(times):6.2f}   {median / cold:.2f}")
    print(
        f"  (a hang counts as one after {HANG_SECONDS:.0f} s, after {FIRST_HANG_SECONDS:.0f} s in the first steps; starts that failed again are in their fault's time)"
    )
    shares = goodput(disturbed)
    whole = disturbed["end"] - disturbed["begin"]
    print(
        f"\nwall clock {whole:.1f} s, undisturbed {undisturbed['end'] - undisturbed['begin']:.1f} s; of that on rank 0"
    )
    for cause, seconds in shares.items():
        print(f"  {cause:<44}{seconds:8.1f} s  {seconds / whole:6.1%}")
    if disturbed["code"] or len(recoveries) < len(faults) or not (same_losses and same_state):
        sys.exit(1)


def first_step_after(run: dict[str, Any], moment: float) -> float | None:
    """Return when the next optimizer step after ``moment`` was done on rank 0."""
    return next((r["time"] for r in run["records"] if _is_step(r) and r["time"] > moment), None)


def _is_step(record: dict[str, Any]) -> bool:
    return record["what"] == "phase" and record["phase"] == "optimizer" and record["rank"] == 0


def recovery(run: dict[str, Any], fault: dict[str, Any]) -> float | None:
    """Return the seconds from a fault to the next step of a later process group."""
    later = (r["time"] for r in run["records"] if _is_step(r) and r["attempt"] > fault["attempt"])
    return next((moment - fault["time"] for moment in later), None)


def goodput(run: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of rank 0 by what they were spent on."""
    own = [record for record in run["records"] if record["rank"] == 0]
    phases = [record for record in own if record["what"] == "phase"]
    total: Counter[str] = Counter()
    kept = {}  # the last time that a step was computed is the one that counts
    for record in phases:
        if record["phase"] in ("forward_backward", "optimizer", "logging"):
            key = (record["phase"], record["step"])
            total["steps that were lost and computed again"] += kept.get(key, 0.0)
            kept[key] = record["seconds"]
        elif record["phase"] in ("data", "checkpoint"):
            total[{"data": "waiting for data", "checkpoint": "saving"}[record["phase"]]] += record["seconds"]
    restores = sum(record["seconds"] for record in own if record["what"] == "restore")
    shares = {
        "steps": sum(kept.values()),
        "steps that were lost and computed again": 0.0,
        "waiting for data": 0.0,
        "saving": 0.0,
        **total,
        "restoring": restores,
    }
    whole = run["end"] - run["begin"]
    return {**shares, "starting, detecting and ending": whole - sum(shares.values())}


def trajectory(run: dict[str, Any]) -> list[tuple[Any, ...]]:
    lines = (run["root"] / "soak/metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[key] for key in ("step", "loss", "grad_norm")) for line in lines]


def state_hashes(run: dict[str, Any]) -> dict[str, str]:
    from bigtrain.checkpoint.manifest import read_manifest
    from bigtrain.checkpoint.store import find_checkpoints

    files = read_manifest(find_checkpoints(run["root"] / "soak")[-1]).files
    return {file.name: file.xxh3 for file in files if file.name.endswith(".safetensors")}


if __name__ == "__main__":
    main()
