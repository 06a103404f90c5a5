"""What a launch runs on, for the record: code, versions, machine, command; without secrets."""

import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from bigtrain import __version__
from bigtrain.log import redact

_PACKAGES = ("torch", "deepspeed", "accelerate", "transformers")
_GIT_SECONDS = 5


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return commit, command, versions and machine of this launch, secrets masked."""
    facts = {
        "commit": _commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "bigtrain": __version__,
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    return redact({key: value for key, value in facts.items() if value is not None})


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of this source, with a plus sign if tracked files were changed."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_SECONDS).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
