"""The command ``bigtrain``, one module a command; nothing else imports hydra."""

import difflib
import importlib
import sys

from bigtrain.errors import EXIT_USER_ERROR

COMMANDS = {
    "train": "train a Transformer",
    "prepare": "prepare a corpus ahead of the training",
    "validate": "validate a checkpoint",
    "generate": "continue a prompt",
    "export": "write the weights for transformers",
    "watch": "look at runs while they run",
    "report": "write a page about runs",
    "checkpoints": "list and verify the checkpoints of a run",
    "inspect_data": "show what a step trains on",
    "where": "say where a run lives",
    "submit": "submit a training run to Slurm",
    "parity": "compare engines and world sizes on a run of your own",
    "verify_resume": "kill and resume a training, and compare",
    "dashboard": "make a dashboard in a Weights & Biases project",
}


def main() -> None:
    """Run ``bigtrain <command> ...``."""
    asked = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if (command := asked.replace("-", "_")) in COMMANDS:
        del sys.argv[1]
        start(command)
    lines = "\n".join(f"  {name:<14} {meaning}" for name, meaning in COMMANDS.items())
    page = f"The same training run, anywhere.\n\n{lines}\n\nMore on each: bigtrain <command> --help"
    if asked in ("-h", "--help"):
        print(page)
        return
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    print(f"bigtrain {asked}: there is no such command{meant}\n\n{page}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def start(command: str) -> None:
    """Run one command with the settings in ``sys.argv``; it ends the process."""
    arguments = []
    if command == "train":
        from bigtrain.supervise.signals import EarlyStop

        arguments = [EarlyStop()]  # before the other imports, which take seconds
    importlib.import_module(f"bigtrain.cli.{command}").main(*arguments)
