"""The command ``bigtrain``, one module a command; nothing else imports hydra."""

import difflib
import glob
import importlib
import itertools
import os
import sys
from pathlib import Path

from bigtrain.errors import EXIT_USER_ERROR

COMMANDS = {
    "train": "train a Transformer",
    "prepare": "prepare a corpus ahead of the training",
    "validate": "validate a checkpoint",
    "predict": "write what a run says of new inputs",
    "explain": "say which tokens or pixels a classifier goes by",
    "score": "write what a model says of the samples of a run",
    "generate": "continue a prompt",
    "evaluate": "score a run or an export on tasks of lm-evaluation-harness",
    "export": "write the weights for transformers",
    "prune": "set the smallest weights of a run to 0",
    "watch": "look at runs while they run",
    "report": "write a page about runs",
    "checkpoints": "list and verify the checkpoints of a run",
    "inspect_data": "show what a step trains on",
    "where": "say where a run lives",
    "sweep": "train with several values of some settings",
    "curve": "say how the loss falls with the size of model and data",
    "submit": "submit a training run to Slurm",
    "parity": "compare engines and world sizes on a run of your own",
    "verify_resume": "kill and resume a training, and compare",
    "doctor": "say what this machine has, and what it lacks",
    "dashboard": "make a dashboard in a Weights & Biases project",
}

COMPLETION = 'Completion by TAB, in bash:  eval "$(bigtrain -sc install=bash)"'


def main() -> None:
    """Run ``bigtrain <command> ...``."""
    asked = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if (command := asked.replace("-", "_")) in COMMANDS:
        del sys.argv[1]
        start(command)
    if asked == "-sc":  # Hydra's option for the completion of shells
        complete()
        return
    lines = "\n".join(f"  {name:<14} {meaning}" for name, meaning in COMMANDS.items())
    page = f"The same training run, anywhere.\n\n{lines}\n\nMore on each: bigtrain <command> --help\n{COMPLETION}"
    if asked in ("-h", "--help"):
        print(page)
        return
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    print(f"bigtrain {asked}: there is no such command{meant}\n\n{page}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def complete() -> None:
    """Complete commands; the settings of a command are completed by Hydra."""
    program, *words = os.environ.get("COMP_LINE", "bigtrain train ").split(" ")
    if len(words) < 2:
        print(" ".join(command for command in COMMANDS if command.startswith(words[0] if words else "")))
    elif words[-2] == "--import":
        print(" ".join(path for path in glob.glob(f"{words[-1]}*") if path.endswith(".py") or os.path.isdir(path)))
    elif words[-1].startswith("--"):
        print("--import")
    elif (command := words[0].replace("-", "_")) in COMMANDS:
        settings = [word for before, word in itertools.pairwise(words) if "--import" not in (before, word)]
        os.environ["COMP_LINE"] = " ".join([program, *settings])
        start(command)


def start(command: str) -> None:
    """Run a command with the settings in ``sys.argv`` and end the process."""
    _tell_other_package(command)
    arguments = []
    if command == "train":
        from bigtrain.supervise.signals import EarlyStop

        arguments = [EarlyStop()]  # before the other imports, which take seconds
    importlib.import_module(f"bigtrain.cli.{command}").main(*arguments)


def _tell_other_package(command: str) -> None:
    """Warn, on rank 0, of a script beside another package than the one that runs, as with PYTHONPATH."""
    script, package = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parents[1]
    beside = script.parent.parent / package.name
    is_script = script.name == f"{command}.py" and (beside / "__init__.py").is_file()
    if is_script and beside != package and os.environ.get("RANK", "0") == "0":
        why = "PYTHONPATH, or what pip has installed, says so"
        print(
            f"warning: {script} runs the bigtrain of {package.parent}, not of {beside.parent}: {why}", file=sys.stderr
        )
