"""How many steps, and how much CPU time, until Muon has AdamW's final validation loss?

    OMP_NUM_THREADS=1 nice python benchmarks/muon.py --root /tmp/muon

Every run is an ordinary one of ``launch/train.py`` on the embedded corpus: same model, batches, schedule and decay, only
``optimizer`` and ``optimizer.lr`` differ. Both optimizers get the same learning rates with the first seed; the best of each
goes on with the other seeds. A run that is finished is not run again and one that was killed is continued, so the same
command with more rates, or seeds, adds to what there is.

CPU time is steps times the CPU time of a step, which is measured apart: both optimizers take turns in one process.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks/results/muon.json"
PLOT = REPOSITORY / "docs/muon.svg"
MODEL = {"hidden_dim": 256, "num_layers": 12, "num_heads": 4, "max_positions": 256, "vocab_size": 4096}
"""10,591,744 parameters."""
KINDS = ("adamw", "muon")
BATCH_SIZE, MICRO_BATCH_SIZE = 16, 8
VALIDATE_EVERY_STEPS = 20
TURNS, TURN_STEPS = 6, 2


@dataclass(frozen=True, slots=True)
class Case:
    """One run."""

    kind: str
    lr: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.kind}-lr{self.lr:g}-seed{self.seed}-steps{self.steps}"

    def command(self, root: Path) -> list[str]:
        settings = {
            "run.name": self.name,
            "run.root": root / "runs",
            "data.root": root / "data",
            "engine": "ddp",
            "engine.precision": "bf16",
            "optimizer": self.kind,
            "optimizer.lr": self.lr,
            "train.seed": self.seed,
            "train.steps": self.steps,
            "train.global_batch_size": BATCH_SIZE,
            "train.micro_batch_size": MICRO_BATCH_SIZE,
            "scheduler.warmup_steps": self.steps // 10,
            "validation.every_steps": VALIDATE_EVERY_STEPS,
            "checkpoint.every_steps": 100,
            "supervision.hang_seconds": 600,
            **{f"model.{key}": value for key, value in MODEL.items()},
        }
        script = str(REPOSITORY / "launch/train.py")
        return [sys.executable, script, "+model=gpt_nano", *(f"{key}={value}" for key, value in settings.items())]


Curve = list[tuple[int, float]]


def train(case: Case, root: Path) -> Curve:
    """Run the case, unless it is finished already, and return (step, validation loss)."""
    events = root / "runs" / case.name / "events.jsonl"
    if not any(event["event"] == "finished" for event in read(events)):
        log = root / f"{case.name}.log"
        print(f"training {case.name}", flush=True)
        with log.open("a") as file:
            subprocess.run(case.command(root), stdout=file, stderr=file, check=True)
    # A run that was continued may have validated a step twice.
    curve = {event["step"]: event["loss"] for event in read(events) if event["event"] == "validation"}
    print(f"{case.name}: {curve[case.steps]:.4f}", flush=True)
    return sorted(curve.items())


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps_to(curve: Curve, loss: float) -> float | None:
    """Return the step at which a curve reaches ``loss``, straight between two validations; None if it never does."""
    for (step, above), (next_step, below) in itertools.pairwise(curve):
        if below <= loss < above:
            return step + (next_step - step) * (above - loss) / (above - below)
    return None if curve[0][1] > loss else curve[0][0]


def cpu_seconds_per_step() -> dict[str, float]:
    """Return the median CPU time of an optimizer step under each optimizer, in turns in this process."""
    import torch

    from bigtrain.config import (
        EngineConfig,
        EngineKind,
        ModelConfig,
        OptimizerConfig,
        OptimizerKind,
        Precision,
        TrainConfig,
        TrainingConfig,
    )
    from bigtrain.config.check import resolve
    from bigtrain.data.read.batch import Batch
    from bigtrain.distributed.collectives import init_process_group, shut_down
    from bigtrain.engine.build import build_engine
    from bigtrain.engine.state import initialise
    from bigtrain.models import build_initial_values, build_model
    from bigtrain.processes import RankInfo

    info, device = RankInfo.from_env(), torch.device("cpu")
    init_process_group(info, device)
    engines, seconds = {}, {kind: [] for kind in KINDS}
    for kind in KINDS:
        config = resolve(
            TrainConfig(
                model=ModelConfig(**MODEL),
                engine=EngineConfig(kind=EngineKind.ddp, precision=Precision.bf16),
                optimizer=OptimizerConfig(kind=OptimizerKind[kind]),
                train=TrainingConfig(global_batch_size=BATCH_SIZE, micro_batch_size=MICRO_BATCH_SIZE),
            )
        )
        engines[kind] = build_engine(config, lambda: build_model(config.model), info=info, device=device)  # noqa: B023
        initialise(engines[kind].state, build_initial_values(config.model, 0), num_threads=1)
    tokens = torch.randint(MODEL["vocab_size"], (MICRO_BATCH_SIZE, MODEL["max_positions"]))
    num_targets, num_micro_steps = (
        torch.tensor(float(BATCH_SIZE * MODEL["max_positions"])),
        BATCH_SIZE // MICRO_BATCH_SIZE,
    )
    for turn in range(TURNS):
        for kind, engine in engines.items():
            start = time.process_time()
            for _ in range(TURN_STEPS):
                micro_batches = [Batch(tokens=tokens, targets=tokens)] * num_micro_steps
                engine.forward_backward(micro_batches, num_targets=num_targets)
                engine.step(1e-4)
            if turn:
                seconds[kind].append((time.process_time() - start) / TURN_STEPS)
    shut_down()
    return {kind: statistics.median(times) for kind, times in seconds.items()}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Train what is missing and return everything that the table, the plot and the JSON show."""
    curves: dict[str, dict[float, dict[int, Curve]]] = {kind: {} for kind in KINDS}
    for lr in sorted(args.lrs):
        for kind in KINDS:
            curves[kind][lr] = {0: train(Case(kind, lr, 0, args.steps), args.root)}
    best = {kind: min(args.lrs, key=lambda lr: curves[kind][lr][0][-1][1]) for kind in KINDS}
    for seed in range(1, args.seeds):
        for kind in KINDS:
            curves[kind][best[kind]][seed] = train(Case(kind, best[kind], seed, args.steps), args.root)
    ours, theirs = (curves[kind][best[kind]] for kind in ("muon", "adamw"))
    reached = [steps_to(ours[seed], theirs[seed][-1][1]) for seed in range(args.seeds)]
    seconds = cpu_seconds_per_step()
    if None in reached:
        print(f"Muon does not reach AdamW's final loss with every seed: {reached}")
    share = statistics.median(math.inf if step is None else step for step in reached) / args.steps
    return {
        "conditions": conditions(),
        "model": MODEL,
        "tokens_per_step": BATCH_SIZE * MODEL["max_positions"],
        "steps": args.steps,
        "best_lr": best,
        "curves": curves,
        "muon_steps_to_adamws_final_loss": reached,
        "cpu_seconds_per_step": seconds,
        "share_of_steps": share,
        "share_of_cpu_time": share * seconds["muon"] / seconds["adamw"],
    }


def conditions() -> dict[str, str]:
    from importlib import metadata

    return {
        "processor": platform.processor() or platform.machine(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def show(result: dict[str, Any]) -> None:
    print(json.dumps({key: value for key, value in result.items() if key != "curves"}, indent=2))
    print(f"{'final validation loss':>24} " + " ".join(f"{lr:>9g}" for lr in sorted(result["curves"]["adamw"])))
    for kind in KINDS:
        finals = [seeds[0][-1][1] for _, seeds in sorted(result["curves"][kind].items())]
        print(f"{kind:>24} " + " ".join(f"{loss:9.4f}" for loss in finals))
    print(f"Muon has AdamW's final loss after {result['share_of_steps']:.2f} x its steps (aim: <= 0.8)")
    print(f"and after {result['share_of_cpu_time']:.2f} x its CPU time (aim: <= 0.9)")


def plot(result: dict[str, Any]) -> None:
    """Draw validation loss over steps of the best rates, and the final loss over the rate."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for kind, colour in zip(KINDS, ("tab:gray", "tab:blue"), strict=True):
        lr = result["best_lr"][kind]
        for seed, curve in result["curves"][kind][lr].items():
            label = f"{kind}, lr {lr:g}" if seed == 0 else None
            left.plot(*zip(*curve, strict=True), color=colour, linewidth=1, label=label)
        rates = sorted(result["curves"][kind])
        finals = [result["curves"][kind][rate][0][-1][1] for rate in rates]
        right.plot(rates, finals, "o-", color=colour, label=kind)
    finals = [curve[-1][1] for curve in result["curves"]["adamw"][result["best_lr"]["adamw"]].values()]
    left.axhline(statistics.median(finals), color="tab:gray", linestyle=":", linewidth=1)
    left.axvline(result["share_of_steps"] * result["steps"], color="tab:blue", linestyle=":", linewidth=1)
    left.set(xlabel="step", ylabel="validation loss", ylim=(None, left.get_ylim()[0] + 3))
    right.set(xlabel="learning rate", ylabel="final validation loss", xscale="log")
    right.set_xticks(rates, [f"{rate:g}" for rate in rates])
    right.set_xticks([], minor=True)
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    PLOT.parent.mkdir(exist_ok=True)
    figure.savefig(PLOT, metadata={"Date": None})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/muon"), help="where runs and data are kept")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3])
    return parser.parse_args()


if __name__ == "__main__":
    args = parse()
    args.root = args.root.resolve()
    args.root.mkdir(parents=True, exist_ok=True)
    result = compare(args)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    plot(result)
