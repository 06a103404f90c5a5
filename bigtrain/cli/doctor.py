"""Say what this machine has, and what to do about the rest: ``bigtrain doctor``."""

import contextlib
import os
import resource
import shutil
import socket
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from bigtrain.cli import hydra_cli
from bigtrain.config.convert import LocalPath
from bigtrain.errors import EXIT_USER_ERROR, BigtrainError
from bigtrain.files import try_lock

GIB = 2**30
ANSWER_SECONDS = 4.0
HELP = """\
Say in one screen what this machine has for training, and what to do where something is missing. Nothing is changed.

  bigtrain doctor
  srun --nodes=4 --ntasks-per-node=1 bigtrain doctor directory=/shared/runs       of each node of a cluster

Exit codes: 0, 2 something to mend (the lines that begin with !).
"""

Line = tuple[str, str, str]  # what was looked at, what was found, what to do about it; empty where all is well


@dataclass(kw_only=True, slots=True)
class DoctorConfig:
    directory: LocalPath = "."
    """Where runs and data will lie."""


def run(config: DoctorConfig) -> int:
    lines = [*_programs(), *_machine(), *_files(Path(config.directory)), *_reach()]
    for name, found, advice in lines:
        print(f"{'!' if advice else ' '} {name:<12} {found}{advice and ': ' + advice}")
    return EXIT_USER_ERROR if any(advice for *_, advice in lines) else 0


def _programs() -> Iterator[Line]:
    import torch

    from bigtrain.distributed.collectives import unused_gpus
    from bigtrain.distributed.rendezvous import require_interfaces

    present = {str(entry.metadata["Name"]).lower(): entry.version for entry in metadata.distributions()}
    names = ("bigtrain", "torch", "transformers", "deepspeed", "accelerate", "datasets")
    yield "versions", ", ".join(f"{name} {present.get(name, 'not there')}" for name in names), ""
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    backend = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if gpus else "gloo"
    device = f"{len(gpus)} x {gpus[0]}, CUDA {torch.version.cuda}" if gpus else "none; runs train on the CPU, in fp32"
    yield "GPUs", device, "" if gpus else unused_gpus() or ""
    try:
        require_interfaces(cuda=bool(gpus))
        yield "network", f"{backend}; {', '.join(name for _, name in socket.if_nameindex())}", ""
    except BigtrainError as error:
        yield "network", backend, str(error)


def _machine() -> Iterator[Line]:
    from bigtrain.plan.machine import available_bytes
    from bigtrain.processes import num_usable_cpus

    yield "processor", f"{num_usable_cpus()} cores, {available_bytes('cpu', 1) / GIB:.1f} GiB of memory free", ""
    yield "compiler", (there := shutil.which("c++")) or "none", "" if there else "for engine.compile, DeepSpeed: g++"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield "descriptors", f"{soft} open files", "" if soft == -1 or soft >= 1024 else f"too few: ulimit -n {hard}"
    yield _space("/dev/shm", Path("/dev/shm"), 1, "NCCL wants more: docker run --ipc=host or --shm-size=8g")


def _files(directory: Path) -> Iterator[Line]:
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            has_locks = try_lock(file.fileno(), directory / "lock") is not None
    except OSError as error:
        yield "locks", f"{directory} cannot be written", f"{error.strerror}; choose another directory"
        return
    yield "locks", f"in {directory.resolve()}", "" if has_locks else "none: a killed run is waited for, until silent"
    yield _space("disk", directory, 10, "a checkpoint takes 12 bytes a parameter, a corpus its text's size")


def _space(name: str, place: Path, least_gib: int, advice: str) -> Line:
    free = shutil.disk_usage(place).free / GIB if place.exists() else 0.0
    return name, f"{free:.1f} GiB free", "" if free >= least_gib else advice


def _reach() -> Iterator[Line]:
    """Ask the hub and wandb at once. No answer is nothing to mend: most compute nodes reach neither."""
    asked = {
        "hub": (os.environ.get("HF_ENDPOINT", "https://huggingface.co"), "HF_HUB_OFFLINE=1, directories for names"),
        "wandb": (os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"), "logging.wandb=offline, later wandb sync"),
    }
    reached: list[str] = []
    threads = [threading.Thread(target=_ask, args=(url, reached), daemon=True) for url, _ in asked.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(ANSWER_SECONDS)
    for name, (url, how) in asked.items():
        yield name, f"{url} {'reached' if url in reached else f'not reached; without it: {how}'}", ""


def _ask(url: str, reached: list[str]) -> None:
    with contextlib.suppress(OSError, ValueError):
        with contextlib.suppress(urllib.error.HTTPError):  # an answer all the same
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_SECONDS).close()
        reached.append(url)


main = partial(hydra_cli.command, DoctorConfig, run, HELP)
