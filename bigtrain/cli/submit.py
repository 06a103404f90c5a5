"""Submit a training run to Slurm: ``python launch/submit.py +model=gpt3_1b cluster=slurm_h100``; ``--help`` says more."""

import dataclasses
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from bigtrain.cli import hydra_cli, own_parts
from bigtrain.cli.settings import group_options, setting_lines
from bigtrain.config import Precision, TrainConfig, parts
from bigtrain.config.bounds import Bound, out_of_bounds
from bigtrain.config.check import check, fit_micro_batch
from bigtrain.config.convert import PathOrUrl, to_dict
from bigtrain.errors import EXIT_FAULT, EXIT_FINISHED, ConfigError, raise_problems
from bigtrain.log import redact

if TYPE_CHECKING:
    from bigtrain.plan import Report

_PACKAGE = Path(__file__).resolve().parents[1]
HOME = next(place for place in (_PACKAGE.parent, _PACKAGE) if (place / "slurm/train.sbatch").is_file())
"""The checkout, or where the package is installed."""
GIB = 2**30
# Slurm reads quotes in #SBATCH lines, but takes backslashes for itself, and a line ends where it ends.
UNFIT = re.compile(r"[\\\x00-\x1f\x7f]")
# man sbatch: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
TIME_LIMIT = re.compile(r"(\d+)(:\d{1,2}){0,2}|\d+-\d+(:\d{1,2}){0,2}|UNLIMITED|INFINITE", re.IGNORECASE)
SIGNAL_EARLY_SECONDS = 60
FIXED = re.compile(r"--(nodes|ntasks|ntasks-per-node|time|signal|job-name|chdir|array|no-requeue)(=|$)|-[NntJDa]")
INTERFACE = re.compile(r"[^\s/:]{1,15}")


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The part of a cluster that a job asks for. Presets are in ``configs/cluster``."""

    num_nodes: Annotated[int, Bound(ge=1)] = 1
    """Nodes of the job."""
    gpus_per_node: Annotated[int, Bound(ge=0)] = 8
    """GPUs of a node, one rank for each; 0 for nodes without, with one rank each."""
    gpu_memory_gib: float = 0.0
    """Memory of one GPU that a rank can have."""
    host_memory_gib: float = 0.0
    """Memory of one node that the job can have."""
    partition: str | None = None
    """Partition; by default the site's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    time_limit: str | None = None
    """Longest time of one launch, as Slurm writes it: ``12:00:00``, ``2-00:00:00``. The run
    goes on in the next launch."""
    save_before_end_seconds: Annotated[int, Bound(ge=1, le=65535)] = 300
    """So long before the time limit the run saves and is queued again."""
    interface: str | None = None
    """The only network interface that rendezvous and ranks listen on, such as ``ib0``; see docs/cluster.md."""
    container_image: PathOrUrl | None = None
    """Image in which the ranks run, with the pyxis plugin."""
    container_mounts: list[PathOrUrl] = field(default_factory=list)
    """More directories that the container sees, ``from:to``; the checkout and the working directory always are."""
    modules: list[str] = field(default_factory=list)
    """Environment modules that the job loads."""
    sbatch_options: list[str] = field(default_factory=list)
    """More options of sbatch, on the command line ``'cluster.sbatch_options=["--constraint=ib"]'``."""


@dataclass(kw_only=True, slots=True)
class SubmitConfig(TrainConfig):
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The cluster."""
    dry_run: bool = False
    """Show the job instead of submitting it."""


HELP = """\
Submit a training run to Slurm. The job saves before its time limit and queues itself again until the run is finished.

  python launch/submit.py +model=gpt3_1b cluster=slurm_h100 cluster.num_nodes=4 dry_run=true
  python launch/submit.py +model=gpt3_1b cluster=slurm_h100 cluster.num_nodes=4 cluster.time_limit=1-00:00:00 engine=fsdp

Clusters: {clusters}

Settings of its own, with their defaults:
{settings}

All others are those of training (python launch/train.py --help). A run that cannot fit the memory that the cluster's
preset declares is refused. Of a sweep, sweep.launcher='srun ...' makes each trial a job (bigtrain sweep --help).

Exit codes: 0, 2 something to change in the command, 1 sbatch has refused the job.
"""


def read(args: list[str]) -> tuple[SubmitConfig, list[str]]:
    """Return the configuration, checked for the job's world, and the arguments of the job's ``launch/train.py``."""
    keys = {arg: arg.partition("=")[0].lstrip("+") for arg in args}
    hydras = {"--cfg", "-c", "--info", "-i", "--multirun", "-m", "-sc"}
    if "cluster" not in keys.values() and not hydras & set(args):
        choices = " ".join(f"cluster={name}" for name in group_options("cluster"))
        raise ConfigError(f"no cluster is chosen; add one of: {choices}")
    config = hydra_cli.compose_run(SubmitConfig, args, config_name="submit")
    world_size, local_world_size = world(config.cluster)
    config = fit_micro_batch(config, max(world_size, 1))
    problems = list(_cluster_problems(config.cluster))
    training_args = [f"{own_parts.IMPORT}={typed}" for typed in parts.imports()]
    training_args += [arg for arg in args if keys[arg].partition(".")[0] not in ("cluster", "dry_run")]
    problems += [
        f"{keys[arg]}: this looks like a secret, and would be readable in the job; put it into the environment instead"
        for arg in args
        if redact(arg) != arg
    ]
    raise_problems(problems or check(config, world_size=world_size, local_world_size=local_world_size))
    hydra_cli.warn(config, world_size, local_world_size)
    return config, training_args


def world(cluster: ClusterConfig) -> tuple[int, int]:
    """Return the number of ranks of the job and of a node."""
    per_node = cluster.gpus_per_node or 1
    return cluster.num_nodes * per_node, per_node


def _cluster_problems(cluster: ClusterConfig) -> Iterator[str]:
    yield from out_of_bounds(cluster, "cluster.")
    if cluster.gpus_per_node and cluster.gpu_memory_gib <= 0:
        yield f"cluster.gpu_memory_gib={cluster.gpu_memory_gib}: say how much memory one GPU has"
    if cluster.host_memory_gib <= 0:
        yield f"cluster.host_memory_gib={cluster.host_memory_gib}: say how much a node has"
    limit, margin = cluster.time_limit, cluster.save_before_end_seconds
    if limit is not None and not TIME_LIMIT.fullmatch(limit):
        forms = "minutes, 12:00:00 or 2-00:00:00 (days-hours:minutes:seconds)"
        yield f"cluster.time_limit={limit}: Slurm takes {forms}"
    if _seconds(limit) <= margin + SIGNAL_EARLY_SECONDS:
        yield (
            f"cluster.time_limit={limit}: must be longer than cluster.save_before_end_seconds={margin} and the minute by "
            "which Slurm's signal may be early"
        )
    if cluster.interface and not INTERFACE.fullmatch(cluster.interface):
        yield f"cluster.interface={cluster.interface!r}: must be the name of a network interface, such as ib0"
    options = cluster.sbatch_options
    if not all(option.startswith("-") for option in options):
        yield f"cluster.sbatch_options={options}: each begins with a dash, such as --constraint=ib"
    if fixed := [option for option in options if FIXED.match(option)]:
        settings = "cluster.num_nodes, cluster.time_limit, cluster.save_before_end_seconds and run.name"
        yield f"cluster.sbatch_options={fixed}: the job has its own; see {settings}"
    for name, value in to_dict(cluster).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and UNFIT.search(text):
                yield f"cluster.{name}={text!r}: no backslashes, line breaks or control characters, please"


def _seconds(limit: str | None) -> float:
    """Return a time limit of Slurm's in seconds; endless if there is none (0, too), or if it is none of Slurm's."""
    if limit is None or not TIME_LIMIT.fullmatch(limit) or limit[0].isalpha():
        return math.inf
    days, _, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(unit * part for unit, part in zip(units, parts, strict=False)) or math.inf


def run(job: tuple[SubmitConfig, list[str]]) -> int:
    """Show or submit the job; refuse one that cannot fit the cluster's memory."""
    config, training_args = job
    preflight(config).require(config.preflight, "submits it regardless")
    script = render(config, training_args, Path.cwd())
    if config.dry_run:
        print(script, end="")
        return EXIT_FINISHED
    directory = config.run.directory
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "job.sbatch"
    path.write_text(script)
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError(f"no sbatch here; the job is in {path}: submit it on a login node of the cluster") from error
    if done.returncode != 0:
        print(f"sbatch refuses {path}:\n{done.stderr.strip()}", file=sys.stderr)
        return EXIT_FAULT
    sys.stderr.write(done.stderr)
    print(instructions(config, done.stdout.strip().partition(";")[0]))
    return EXIT_FINISHED


def preflight(config: SubmitConfig) -> "Report":
    """Return the estimate of the run's memory beside what the cluster declares."""
    from bigtrain.plan import Machine, Report, measure_model

    cluster = config.cluster
    world_size, per_node = world(cluster)
    host_bytes = int(cluster.host_memory_gib * GIB) // per_node
    on_gpu = cluster.gpus_per_node > 0
    available = int(cluster.gpu_memory_gib * GIB) if on_gpu else host_bytes
    machine = Machine(world_size, per_node, "cuda" if on_gpu else "cpu", available, host_bytes)
    precision = config.engine.precision or (Precision.bf16 if on_gpu else Precision.fp32)
    config = dataclasses.replace(config, engine=dataclasses.replace(config.engine, precision=precision))
    return Report(config, machine, measure_model(config.model))


def render(config: SubmitConfig, training_args: list[str], directory: Path) -> str:
    """Return the batch script of a job that runs in ``directory``; every value in it is quoted."""
    cluster = config.cluster
    environ = {"BIGTRAIN_HOME": str(HOME)}
    if HOME == _PACKAGE and not cluster.container_image:
        environ["BIGTRAIN_VENV"] = sys.prefix
    if cluster.interface:
        environ["BIGTRAIN_INTERFACE"] = cluster.interface
    if cluster.container_image:
        mounts = ",".join([f"{path}:{path}" for path in dict.fromkeys((HOME, directory))] + cluster.container_mounts)
        container = [f"--container-image={cluster.container_image}", f"--container-mounts={mounts}"]
        # Where they are set in an image, enroot wants a GPU on every node; where they are not, it gives none.
        gpus = ("all", "compute,utility") if cluster.gpus_per_node else ("void", "")
        environ["NVIDIA_VISIBLE_DEVICES"], environ["NVIDIA_DRIVER_CAPABILITIES"] = gpus
        environ["BIGTRAIN_SRUN_OPTIONS"] = "\n".join([*container, f"--container-workdir={directory}"])
    lines = [
        "#!/usr/bin/env bash",
        "# Written by bigtrain submit; the same command writes it again.",
        *(f"#SBATCH {shlex.quote(option)}" for option in sbatch_options(config, directory)),
        "",
        *(f"module load {shlex.quote(module)} || exit 2" for module in cluster.modules),
        *(f"export {name}={shlex.quote(value)}" for name, value in environ.items()),
        shlex.join(["exec", "bash", str(HOME / "slurm" / "train.sbatch"), *training_args]),
        "",
    ]
    return "\n".join(lines)


def sbatch_options(config: SubmitConfig, directory: Path) -> list[str]:
    """Return the options of sbatch, unquoted; the user's own come last and win."""
    cluster = config.cluster
    wanted = {
        "job-name": config.run.name,
        "nodes": cluster.num_nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": cluster.gpus_per_node or None,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time_limit,
        "signal": f"B:USR1@{cluster.save_before_end_seconds}",
        "mem": 0,
        "open-mode": "append",
        "output": "slurm-%j.log",
        "chdir": directory,
        "dependency": "singleton",  # two jobs must not train the same run at once
    }
    options = [f"--{name}={value}" for name, value in wanted.items() if value is not None]
    return [*options, "--exclusive", "--requeue", *cluster.sbatch_options]


def instructions(config: SubmitConfig, number: str) -> str:
    """Return how to watch, stop and continue job ``number``."""
    world_size, per_node = world(config.cluster)
    return f"""\
job {number}: {config.run.name} on {config.cluster.num_nodes} x {per_node} = {world_size} ranks, in {config.run.directory}
  watch               tail -F slurm-{number}.log {shlex.quote(str(config.run.directory))}/log/train.log
                      squeue --job={number}
  save and stop       scancel --batch --signal=TERM {number}
  save, queue again   scancel --batch --signal=USR1 {number}
  stop at once        scancel {number}     (a save that takes less than Slurm's KillWait, 30 s, still succeeds)
  continue            the same command again; so it does by itself after the time limit, a preemption or a dead node"""


def help_page() -> str:
    own = [f"cluster.{f.name}" for f in dataclasses.fields(ClusterConfig)] + ["dry_run"]
    settings = setting_lines(SubmitConfig, own)
    return HELP.format(clusters=" ".join(group_options("cluster")), settings=settings)


main = partial(hydra_cli.main, read, run, help_page)
