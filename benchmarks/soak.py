"""Faults one after the other, real restarts by torchrun, and what they cost.

    OMP_NUM_THREADS=1 python benchmarks/soak.py --faults 10
    OMP_NUM_THREADS=1 python benchmarks/soak.py --faults 1000 --directory soak      hours; Ctrl-C prints what there is
    python benchmarks/soak.py --faults 1000 --directory soak --report              the same, from elsewhere

The same command goes on where it was interrupted. A tiny model is trained twice by the same command line: once
undisturbed, and once with a fault in every process group that torchrun starts, drawn by the seed: a rank is killed
(kill -9), raises, is stopped (SIGSTOP) or hangs in native code, in any phase of any of the next steps. Losses and
hashes of the samples of all steps, and the state in all checkpoints, have to be equal bit by bit.

*Recovery* is the time from the fault to the end of the next optimizer step, *cold start* that from the
command to the end of the first one. Faults in phases before the first step count as one more start.
"""

import argparse
import bisect
import ctypes
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
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
NUM_COLD_STARTS = 3
COLD_STEPS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engine", default="fsdp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where everything is kept, to go on later; by default nowhere")
    parser.add_argument("--report", action="store_true", help="only print what there is")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--first-group", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(Path(args.worker), args)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.directory or Path(scratch)
        try:
            if not args.report:
                train_all(directory, args)
        except KeyboardInterrupt:
            print("interrupted; what there is so far:\n", file=sys.stderr)
        sys.exit(0 if report(args, directory) else 1)


def train_all(directory: Path, args: argparse.Namespace) -> None:
    """Train whatever has not been trained to its end."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_COLD_STARTS):
        launch(directory / f"cold-{number}", args, num_faults=0, num_steps=COLD_STEPS)
    launch(directory / "undisturbed", args, num_faults=0, num_steps=num_steps(args.faults))
    launch(directory / "disturbed", args, num_faults=args.faults, num_steps=num_steps(args.faults))


def num_steps(num_faults: int) -> int:
    return 4 * num_faults + 12


# One launch of torchrun


def launch(root: Path, args: argparse.Namespace, *, num_faults: int, num_steps: int) -> None:
    """Train from where the last launch was interrupted, if there was one, to the end."""
    root.mkdir(exist_ok=True)
    before = read(root)
    if before.code == 0:
        return
    first_group = 1 + max((record["group"] for record in before.records), default=-1)
    own = ["--faults", num_faults, "--steps", num_steps, "--worker", root, "--first-group", first_group]
    own += ["--engine", args.engine, "--seed", args.seed]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.ranks}"]
    command = [*torchrun, f"--max-restarts={max(0, num_faults - first_group)}", str(SCRIPT), *map(str, own)]
    begin, code = time.monotonic(), None
    with (root / "log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait()
        finally:
            process.terminate()
            process.wait()
            line = json.dumps({"begin": begin, "end": time.monotonic(), "code": code})
            with (root / "launches").open("a") as file:
                file.write(line + "\n")
    if code:
        print((root / "log").read_text()[-4000:], file=sys.stderr)


@dataclass(frozen=True, slots=True)
class History:
    """What a run has left."""

    root: Path
    launches: list[dict[str, Any]]
    """``begin``, ``end`` and ``code`` of every torchrun."""
    records: list[dict[str, Any]]
    """What the ranks have noted, by time."""
    steps: list[tuple[float, int]]
    """When rank 0 has done an optimizer step, and in which process group."""

    @property
    def code(self) -> int | None:
        """Exit code of the last torchrun."""
        return self.launches[-1]["code"] if self.launches else None

    def of_rank_0(self, what: str) -> list[dict[str, Any]]:
        return [record for record in self.records if record["what"] == what and record["rank"] == 0]

    def first_step_after(self, moment: float, *, first_group: int = 0) -> float | None:
        """Return when the next optimizer step after ``moment`` was done on rank 0."""
        later = itertools.islice(self.steps, bisect.bisect(self.steps, (moment, math.inf)), None)
        return next((time for time, group in later if group >= first_group), None)


def read(root: Path) -> History:
    """Return what the run has left so far; it may be running."""
    records = [record for path in root.glob("rank-*.jsonl") for record in read_lines(path)]
    records.sort(key=lambda record: record["time"])
    launches = read_lines(root / "launches") if (root / "launches").exists() else []
    if records and (not launches or records[-1]["time"] > launches[-1]["end"]):
        begin = min(
            r["begun"] for r in records if r["what"] == "process" and (not launches or r["time"] > launches[-1]["end"])
        )
        launches.append({"begin": begin, "end": records[-1]["time"], "code": None})  # running, or killed
    done = [r for r in records if r["what"] == "phase" and r["phase"] == "optimizer" and r["rank"] == 0]
    return History(root, launches, records, [(record["time"], record["group"]) for record in done])


def read_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


# In the ranks


def work(root: Path, args: argparse.Namespace) -> None:
    """Train as one rank, with the fault that is drawn for it."""
    rank, group = int(os.environ["RANK"]), args.first_group + int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    file = os.open(root / f"rank-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(what: str, **facts: Any) -> None:
        line = json.dumps({"what": what, "time": time.monotonic(), "rank": rank, "group": group, **facts})
        os.write(file, line.encode() + b"\n")

    note("process", begun=BEGIN)
    from bigtrain.config import (
        CheckpointConfig,
        DataConfig,
        DataSource,
        EngineConfig,
        EngineKind,
        LoggingConfig,
        ModelConfig,
        RunConfig,
        SupervisionConfig,
        TrainConfig,
        TrainingConfig,
    )
    from bigtrain.config.check import resolve
    from bigtrain.run import launching, trainer
    from bigtrain.supervise.failures import is_lost_connection
    from bigtrain.supervise.heartbeat import Heartbeat
    from bigtrain.supervise.launch import Launch

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
        logging=LoggingConfig(layer_norms_every_steps=0),
    )
    enter, supervise, fill, record = Heartbeat.enter, Launch.supervise, launching.fill_state, trainer.record_save
    fault = draw(args.seed, group, int(os.environ["WORLD_SIZE"])) if group < args.faults else None
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

    def watched_fill(*options: Any) -> Any:
        begin = time.monotonic()
        cursor = fill(*options)
        note("restore", seconds=time.monotonic() - begin, step=cursor.step)
        return cursor

    def watched_record(run: Any, saved: Any) -> None:
        record(run, saved)
        if saved and saved.error is None and rank == 0:
            note("saved", step=saved.step, state=state_of(saved.path))

    Heartbeat.enter, Launch.supervise = watched_enter, watched_supervise
    launching.fill_state, trainer.record_save = watched_fill, watched_record
    try:
        code = launching.run(resolve(config))
    except Exception as error:
        code = 1
        if not is_lost_connection(error):
            raise
    sys.exit(code)


def state_of(checkpoint: Path) -> dict[str, str]:
    """Return the hashes of weights and optimizer state by file."""
    from bigtrain.checkpoint.manifest import read_manifest

    files = read_manifest(checkpoint).files
    return {file.name: file.xxh3 for file in files if file.name.endswith(".safetensors")}


def draw(seed: int, group: int, num_ranks: int) -> dict[str, Any]:
    """Return the fault of a process group."""
    chance = random.Random(f"{seed}/{group}")
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


def report(args: argparse.Namespace, directory: Path) -> bool:
    """Print what there is so far; return whether that is as it should be."""
    undisturbed, disturbed = read(directory / "undisturbed"), read(directory / "disturbed")
    cold_starts = [cold_start(read(root)) for root in [*directory.glob("cold-*"), undisturbed.root]]
    cold = statistics.median([seconds for seconds in cold_starts if seconds] or [float("nan")])
    faults = [record for record in disturbed.records if record["what"] == "fault"]
    times = [recovery(disturbed, fault) for fault in faults]
    is_over = disturbed.code is not None
    num_open = 0 if is_over else len(list(itertools.takewhile(lambda seconds: seconds is None, reversed(times))))
    unrecovered = times.count(None) - num_open
    print(f"engine={args.engine} ranks={args.ranks}, {num_steps(args.faults)} steps, a checkpoint every {EVERY_STEPS}")
    print(f"faults {len(faults)} of {args.faults}: {dict(Counter(fault['kind'] for fault in faults))}")
    print(f"        {dict(Counter(fault['phase'] for fault in faults))}")
    under_way = f", {num_open} under way" if num_open else ""
    print(
        f"recovered {len(times) - times.count(None)}, unrecovered {unrecovered}{under_way}; exit code {disturbed.code}"
    )
    is_same = print_comparison(undisturbed, disturbed)
    print_recoveries(faults, times, cold)
    print_shares(undisturbed, disturbed)
    return is_same and unrecovered == 0 and not disturbed.code


def print_comparison(undisturbed: History, disturbed: History) -> bool:
    """Print whether the runs are the same as far as the disturbed one has come; return it."""
    (losses, samples), (other_losses, other_samples) = trajectory(undisturbed), trajectory(disturbed)
    states = {record["step"]: record["state"] for record in undisturbed.of_rank_0("saved")}
    saved = disturbed.of_rank_0("saved")
    same_losses = other_losses == losses[: len(other_losses)]
    num_samples = sum(1 for own, other in zip(samples, other_samples, strict=False) if own != other)
    same_states = all(record["state"] == states.get(record["step"]) for record in saved)
    print(
        f"against the undisturbed run: losses and gradient norms of all {len(other_losses)} steps equal: {same_losses};"
    )
    print(
        f"  steps up to which samples were lost or repeated: {num_samples}; state in all {len(saved)} checkpoints equal: {same_states}"
    )
    return same_losses and same_states and num_samples == 0


def print_recoveries(faults: list[dict[str, Any]], times: list[float | None], cold: float) -> None:
    print(f"\nseconds to the next optimizer step{'':12} median   worst   over a cold start ({cold:.2f} s)")
    for kind in KINDS:
        own = [seconds for fault, seconds in zip(faults, times, strict=True) if fault["kind"] == kind and seconds]
        if own:
            median = statistics.median(own)
            print(f"  after {kind:<40}{median:6.2f}  {max(own):6.2f}   {median / cold:.2f}")
    print(
        f"  (a hang counts as one after {HANG_SECONDS:.0f} s, after {FIRST_HANG_SECONDS:.0f} s in the first steps; "
        "starts that failed again are in their fault's time)"
    )


def print_shares(undisturbed: History, disturbed: History) -> None:
    whole = seconds_of(disturbed)
    print(f"\nwall clock {whole:.1f} s, undisturbed {seconds_of(undisturbed):.1f} s; of that on rank 0")
    for cause, seconds in goodput(disturbed).items():
        print(f"  {cause:<44}{seconds:8.1f} s  {seconds / max(whole, 1e-9):6.1%}")


def seconds_of(run: History) -> float:
    return sum(launch["end"] - launch["begin"] for launch in run.launches)


def cold_start(run: History) -> float | None:
    """Return the seconds from the command to the end of the first step."""
    begin = run.launches[0]["begin"] if run.launches else 0.0
    first = run.first_step_after(begin)
    return first and first - begin


def recovery(run: History, fault: dict[str, Any]) -> float | None:
    """Return the seconds from a fault to the next step of a later process group; time between launches is nobody's."""
    step = run.first_step_after(fault["time"], first_group=fault["group"] + 1)
    if step is None:
        return None
    gaps = zip(run.launches[:-1], run.launches[1:], strict=True)
    idle = sum(new["begin"] - old["end"] for old, new in gaps if fault["time"] < old["end"] and new["begin"] < step)
    return step - fault["time"] - idle


def goodput(run: History) -> dict[str, float]:
    """Return the seconds of rank 0 by what they were spent on."""
    total = dict.fromkeys(
        ["steps", "lost steps, computed again", "waiting for data", "saving", "initialisation", "restoring"], 0.0
    )
    kept: dict[Any, float] = {}  # the last time that a step was computed is the one that counts
    for record in run.of_rank_0("phase"):
        if record["phase"] in ("forward_backward", "optimizer", "logging"):
            key = (record["phase"], record["step"])
            total["lost steps, computed again"] += kept.get(key, 0.0)
            kept[key] = record["seconds"]
        elif record["phase"] in ("data", "checkpoint"):
            total[{"data": "waiting for data", "checkpoint": "saving"}[record["phase"]]] += record["seconds"]
    total["steps"] = sum(kept.values())
    total["restoring"] = sum(record["seconds"] for record in run.of_rank_0("restore"))
    initialised: dict[int, float] = {}  # when the first phase of a process group, the start, was over
    for record in reversed(run.records):
        if record["rank"] == 0 and (record["what"] == "phase" or record["group"] not in initialised):
            initialised[record["group"]] = record["time"]
    begun = {process["group"]: process["begun"] for process in run.of_rank_0("process")}
    total["initialisation"] = sum(initialised[group] - begun[group] for group in begun) - total["restoring"]
    return {**total, "noticing faults, ending and restarting": seconds_of(run) - sum(total.values())}


def trajectory(run: History) -> tuple[list[tuple[Any, ...]], list[str]]:
    """Return step, loss and gradient norm of every step, and the hash of all samples up to it."""
    path = run.root / "soak/metrics.jsonl"
    records = read_lines(path) if path.exists() else []
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records], [r["data_digest"] for r in records]


if __name__ == "__main__":
    main()
