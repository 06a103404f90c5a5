"""``slurm/train.sbatch`` on a real Slurm of several nodes: it trains, and goes on after whatever ends an attempt."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from bigtrain.checkpoint.store import find_checkpoints
from tests.distributed.launches import LAUNCH, SMALL, environment, events, fork, num_steps, trajectory
from tests.slurm.cluster import GPUS, Cluster, wait_until, why_not
from tests.wandb_files import read_history

pytestmark = [pytest.mark.skipif(why_not() is not None, reason=f"no Slurm: {why_not()}"), pytest.mark.timeout(400)]

REPOSITORY = LAUNCH.parent
# Without an end: every test ends its run when it has seen enough.
TRAINING = [*SMALL, "engine=ddp", "train.steps=1000000", "checkpoint.every_steps=25"]
TIMEOUT_SECONDS = 150.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(num_nodes=4) as started:
        yield started


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float, float, float]]:
    """The beginning of the run when nothing happens to it."""
    directory = tmp_path_factory.mktemp("reference")
    assert fork("train.py", *TRAINING, "run.stop_after_steps=60", cwd=directory, world_size=2).code == 75
    return trajectory(directory / "runs/gpt_nano")


class Job:
    """A job of ``train.sbatch`` with its working directory."""

    def __init__(self, cluster: Cluster, directory: Path, *options: str, args: list[str], **environ: str) -> None:
        bin_directories = f"{Path(sys.executable).parent}:{cluster.environ['PATH']}"
        if stand_ins := environ.pop("bin", None):
            environ["BIGTRAIN_VENV"] = str(Path(stand_ins).parent)
        variables = environment(**environ, BIGTRAIN_HOME=str(REPOSITORY), PYTHONPATH=str(REPOSITORY))
        self.cluster, self.directory, self.run = cluster, directory, directory / "runs/gpt_nano"
        said = cluster.call(
            *("sbatch", "--parsable", f"--chdir={directory}", *options, str(REPOSITORY / "slurm/train.sbatch"), *args),
            **(variables | {"PATH": bin_directories, "SLURM_CONF": cluster.environ["SLURM_CONF"]}),
        )
        assert said.isdigit(), said
        self.number = said

    def log(self) -> str:
        path = self.directory / f"slurm-{self.number}.log"
        return path.read_text() if path.exists() else ""

    def state(self) -> dict[str, str]:
        return self.cluster.job(self.number)

    def trouble(self) -> str:
        paths = [*self.directory.glob("slurm-*.log"), *self.directory.rglob("log/*/*.log")]
        return "\n".join([str(self.state()), *(f"--- {path}\n{path.read_text()[-3000:]}" for path in paths)])

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that happens while the job lives."""

        def holds() -> bool:
            assert self.state()["JobState"] not in ("FAILED", "COMPLETED"), self.trouble()
            return condition()

        wait_until(holds, self.trouble, TIMEOUT_SECONDS)

    def wait_for_steps(self, count: int) -> None:
        self.wait_until(lambda: num_steps(self.run) >= count)

    def wait_for(self, *states: str) -> dict[str, str]:
        """Wait for the end of the job and return how it ended."""
        wait_until(lambda: self.state()["JobState"] in states, self.trouble, TIMEOUT_SECONDS)
        return self.state()


def stand_in(directory: Path, script: str) -> str:
    """Put a ``torchrun`` of our own into a directory and return the directory."""
    (directory / "bin").mkdir()
    path = directory / "bin/torchrun"
    path.write_text(f"#!/usr/bin/env bash\nrun={directory}/runs/gpt_nano\n{script}\n")
    path.chmod(0o755)
    return str(path.parent)


def test_two_nodes_train_and_a_signal_saves_and_queues_again_and_scancel_does_not(
    cluster: Cluster, tmp_path: Path, reference: list[tuple[int, float, float, float]]
):
    job = Job(cluster, tmp_path, "--nodes=2", args=[*TRAINING, "logging=wandb", "logging.wandb=offline"])
    job.wait_for_steps(10)
    cluster.call("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_until(lambda: "queueing again" in job.log())
    (stop,) = events(job.run, "stop")
    job.wait_for_steps(max(stop["step"] + 10, len(reference)))
    job.wait_until(lambda: len(wandb_files(job.run)) == 2)  # wandb begins in its own time
    cluster.call("scancel", job.number)
    assert job.wait_for("CANCELLED")["Restarts"] == "1", job.trouble()
    wait_until(lambda: job.log().count("stopped and saved") == 2, job.trouble, TIMEOUT_SECONDS)

    (start,), (resume,), stops = events(job.run, "start"), events(job.run, "resume"), events(job.run, "stop")
    assert start["world_size"] == resume["world_size"] == 2
    assert resume["step"] == stop["step"]
    assert stop["reason"] == "SIGUSR1"
    assert len(stops) == 2
    assert job.log().count("] attempt on 2 x 1 ranks") == 2
    assert trajectory(job.run)[: len(reference)] == reference
    assert [path.name for path in job.run.parent.iterdir()] == ["gpt_nano"]
    assert len(list((job.run / "log" / f"job-{job.number}").glob("node*.log"))) >= 2
    assert_one_wandb_run(job.run, num_launches=2)


def wandb_files(run: Path) -> list[Path]:
    return list(run.glob("wandb/offline-run-*/*.wandb"))


def assert_one_wandb_run(run: Path, num_launches: int) -> None:
    """Check that all launches have gone on with one wandb run, which has every step once."""
    files = wandb_files(run)
    assert len(files) == num_launches
    assert {path.stem for path in files} == {f"run-{(run / 'wandb_id').read_text().strip()}"}
    steps = [int(row["step"]) for row in read_history(run) if "train/loss" in row]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= events(run, "stop")[0]["step"]


def test_a_node_that_dies_is_replaced(
    cluster: Cluster, tmp_path: Path, reference: list[tuple[int, float, float, float]]
):
    # The nodes share the loopback interface, so it can be the one that everything is bound to.
    job = Job(cluster, tmp_path, "--nodes=2", args=TRAINING, BIGTRAIN_INTERFACE="lo")
    job.wait_until(lambda: bool(find_checkpoints(job.run)))
    assert listening_addresses(job) == {"127.0.0.1"}
    _, dead = cluster.call("scontrol", "show", "hostnames", job.state()["NodeList"]).split()
    cluster.kill_node(dead)
    cluster.call("scontrol", "update", f"nodename={dead}", "state=down", "reason=power")  # or Slurm notices by itself
    job.wait_until(lambda: bool(events(job.run, "resume")))
    job.wait_for_steps(max(events(job.run, "resume")[0]["step"] + 10, len(reference)))
    nodes = cluster.call("scontrol", "show", "hostnames", job.state()["NodeList"]).split()
    cluster.call("scancel", job.number)
    cluster.start_node(dead)
    assert job.wait_for("CANCELLED")["Restarts"] == "1", job.trouble()
    assert len(nodes) == 2
    assert dead not in nodes
    assert trajectory(job.run)[: len(reference)] == reference


def test_the_time_limit_preemption_and_a_node_that_is_cut_off_queue_again(
    cluster: Cluster, tmp_path: Path, reference: list[tuple[int, float, float, float]]
):
    # Side by side, because Slurm looks at time limits every half minute only, and silence takes as long.
    for name in ("limited", "preempted", "cut"):
        (tmp_path / name).mkdir()
    limits = ["--nodes=1", "--nodelist=node2", "--time=1", "--signal=B:USR1@25"]
    limited = Job(cluster, tmp_path / "limited", *limits, args=TRAINING)
    preempted = Job(cluster, tmp_path / "preempted", "--nodes=1", "--nodelist=node1", args=TRAINING)
    cut_off = Job(cluster, tmp_path / "cut", "--nodes=1", "--exclude=node1,node2", args=TRAINING)
    preempted.wait_for_steps(10)
    preempt(cluster)
    cut_off.wait_for_steps(30)
    silent = cut_off.state()["NodeList"]
    cluster.freeze_node(silent)
    cluster.call("scontrol", "update", f"nodename={silent}", "state=down", "reason=cut")
    preempted.wait_until(lambda: bool(events(preempted.run, "resume")))
    cluster.restart_controller("SlurmctldParameters=preempt_send_user_signal")
    preempt(cluster)
    check_queued_again(cluster, limited, ["SIGUSR1"])
    check_queued_again(cluster, preempted, ["SIGTERM", "SIGUSR1"])
    check_cut_off(cluster, cut_off, silent, reference)


def check_queued_again(cluster: Cluster, job: Job, reasons: list[str]) -> None:
    """Check that a job has stopped and gone on for these reasons, and cancel it."""
    job.wait_for_steps(1)
    job.wait_until(lambda: len(events(job.run, "resume")) >= len(reasons))
    cluster.call("scancel", job.number)
    # On a busy machine a signal may also come before the first step.
    assert int(job.wait_for("CANCELLED")["Restarts"]) >= len(reasons), job.trouble()
    stops = events(job.run, "stop")[: len(reasons)]
    assert [stop["reason"] for stop in stops] == reasons
    resumes = events(job.run, "resume")[: len(reasons)]
    assert [event["step"] for event in resumes] == [stop["step"] for stop in stops]


def preempt(cluster: Cluster) -> None:
    """Let a job of a higher partition have node1 for a second."""
    urgent = ["--partition=high", "--nodelist=node1", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    assert cluster.call("sbatch", "--parsable", *urgent).isdigit()


def check_cut_off(cluster: Cluster, job: Job, silent: str, reference: list[tuple[int, float, float, float]]) -> None:
    """Check that a job takes its run over from a node that is ``silent``, and that this one leaves it alone later."""
    job.wait_until(lambda: "gives no sign of life any more: taken over" in job.log())
    job.wait_until(lambda: bool(events(job.run, "resume")))
    (resume,) = events(job.run, "resume")
    frozen = processes_of(job)
    cluster.thaw_node(silent)
    wait_until(lambda: len(processes_of(job)) < len(frozen), job.trouble, 30)
    job.wait_for_steps(max(resume["step"] + 10, len(reference)))
    cluster.call("scancel", job.number)
    assert job.wait_for("CANCELLED")["Restarts"] == "1", job.trouble()
    cluster.call("scontrol", "update", f"nodename={silent}", "state=resume")
    steps = trajectory(job.run)
    for own, expected in zip(steps, reference, strict=False):  # which two ranks have computed
        assert own[:2] == pytest.approx(expected[:2], rel=1e-3)
    assert [step for step, *_ in steps] == list(range(1, len(steps) + 1)), "nobody else has written"


def test_three_failures_without_progress_end_it(cluster: Cluster, tmp_path: Path):
    # Two attempts fail after a checkpoint; those after them fail without one.
    script = 'n=$(ls "$run/log/" | grep -c try); touch "$run/log/try$n"; ((n < 2)) && mkdir -p "$run/checkpoints/step-0000000$n"'
    job = Job(cluster, tmp_path, "--nodes=1", args=TRAINING, bin=stand_in(tmp_path, f"{script}\nexit 1"))
    # Nor does it go on for ever when a rank dies before the first step and torchrun's SIGTERM stops another one.
    (tmp_path / "early").mkdir()
    record = json.dumps({"code": 75, "reason": "SIGTERM", "step": 0, "attempt": 1})
    script = f"[ -e $run/log/first ] && echo '{record}' >$run/exit.json; touch $run/log/first; exit 1"
    limited = [*TRAINING, "supervision.max_failed_attempts=2"]
    early = Job(cluster, tmp_path / "early", "--nodes=1", args=limited, bin=stand_in(tmp_path / "early", script))
    state = job.wait_for("FAILED", "COMPLETED")
    assert (state["ExitCode"], state["Restarts"]) == ("3:0", "1"), job.trouble()
    assert len(list(job.run.glob("log/try*"))) == 5
    assert "3 launches in a row failed without a checkpoint after step 1" in job.log()
    record = json.loads((job.run / "exit.json").read_text())
    assert (record["code"], record["step"]) == (3, 1), "the ranks have left no word"
    state = early.wait_for("FAILED", "COMPLETED")
    assert (state["ExitCode"], state["Restarts"]) == ("3:0", "0"), early.trouble()


def test_the_end_that_a_run_records_decides(cluster: Cluster, tmp_path: Path):
    # (code, reason, torchrun's code) and what becomes of the job
    ends = {
        "hopeless": ((3, "no progress", 1), "3:0"),
        "mistake": ((2, "no such corpus", 1), "2:0"),
        "wanted": ((75, "run.stop_after_steps", 0), "75:0"),
        "finished": ((0, "finished", 0), "0:0"),
    }
    jobs = {}
    for name, ((code, reason, torchrun_code), _) in ends.items():
        (tmp_path / name).mkdir()
        record = json.dumps({"code": code, "reason": reason, "step": 1, "attempt": 1}, indent=2)
        script = f"[ -e $run/exit.json ] && exit 1; echo '{record}' >$run/exit.json; exit {torchrun_code}"
        bin_directory = stand_in(tmp_path / name, script)
        before = tmp_path / name / "runs/gpt_nano/exit.json"  # of a job that has given up; submitting anew forgives it
        before.parent.mkdir(parents=True)
        before.write_text('{"code": 3, "reason": "failed 3 times", "step": 1, "attempt": 1}')
        jobs[name] = Job(cluster, tmp_path / name, "--nodes=1", args=TRAINING, bin=bin_directory)
    for name, (_, expected) in ends.items():
        state = jobs[name].wait_for("FAILED", "COMPLETED")
        assert (state["ExitCode"], state["Restarts"]) == (expected, "0"), jobs[name].trouble()


def test_a_task_of_an_array_queues_itself_again_and_has_its_environment_though_sbatch_exports_none(
    cluster: Cluster, tmp_path: Path
):
    stopped, finished = (
        json.dumps({"code": code, "reason": reason, "step": 1, "attempt": 1})
        for code, reason in ((75, "SIGUSR1"), (0, "finished"))
    )
    # The last task has the array's own number. It ends when the first one is there, which waits until it is back.
    script = f"""
run=${{run}}_$SLURM_ARRAY_TASK_ID
echo "$SLURM_ARRAY_TASK_ID ${{MASTER_ADDR:-}}" >>$run/environments
if ((SLURM_ARRAY_TASK_ID == 1)); then until [ -e $run/../done ]; do sleep 0.1; done; exit 0; fi
if [ -e $run/again ]; then echo '{finished}' >$run/exit.json; touch $run/../done; exit 0; fi
until [ -e ${{run%_2}}_1/environments ]; do sleep 0.1; done
touch $run/again; echo '{stopped}' >$run/exit.json
"""
    directory = Path(stand_in(tmp_path, script))
    # Every task has a run of its own: one that another task has just taken would be refused.
    python = directory / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" "run.name=gpt_nano_$SLURM_ARRAY_TASK_ID"\n')
    python.chmod(0o755)
    options = [
        f"--export=BIGTRAIN_HOME={REPOSITORY},BIGTRAIN_VENV={directory.parent},PATH={Path(sys.executable).parent}:/usr/bin:/bin"
    ]
    first = Job(cluster, tmp_path, "--nodes=1", "--array=1-2", *options, args=TRAINING)
    states = [f"{first.number}_{task}" for task in (1, 2)]

    def ended() -> bool:
        return all(cluster.job(task).get("JobState") in ("COMPLETED", "FAILED") for task in states)

    wait_until(ended, first.trouble, TIMEOUT_SECONDS)
    found = [cluster.job(task) for task in states]
    assert [(state["JobState"], state["Restarts"]) for state in found] == [("COMPLETED", "0"), ("COMPLETED", "1")]
    seen = sorted(line for path in tmp_path.glob("runs/*/environments") for line in path.read_text().splitlines())
    assert [line.split()[0] for line in seen] == ["1", "2", "2"]
    assert all(len(line.split()) == 2 for line in seen), "MASTER_ADDR reached the step"


def test_every_gpu_gets_a_rank_and_every_argument_arrives(cluster: Cluster, tmp_path: Path):
    text = 'it\'s a $HOME "corpus"; `x`'
    bin_directory = stand_in(tmp_path, 'printf "%s\\n" "$@" >$run/arguments')
    job = Job(
        cluster, tmp_path, "--nodes=1", "--partition=gpu", args=[*TRAINING, f"data.path={text}"], bin=bin_directory
    )
    job.wait_for("COMPLETED", "FAILED")
    arguments = (job.run / "arguments").read_text().splitlines()
    assert f"--nproc-per-node={len(GPUS)}" in arguments
    assert f"data.path={text}" in arguments
    assert any(argument == "--master-addr=gpunode" for argument in arguments)


def test_submit_sends_the_job_that_it_shows(cluster: Cluster, tmp_path: Path):
    comment = 'it\'s $HOME "quoted" # not a comment; `x`'
    command = [sys.executable, str(LAUNCH / "submit.py"), *TRAINING, "cluster=slurm_cpu", "cluster.num_nodes=2"]
    options = ["--comment=" + comment, "--begin=now+1"]
    bin_directory = stand_in(tmp_path, 'printf "%s\n" "$@" >$run/arguments')
    path = f"{Path(sys.executable).parent}:{cluster.environ['PATH']}"
    variables = environment(PATH=path, PYTHONPATH=str(REPOSITORY), SLURM_CONF=cluster.environ["SLURM_CONF"])
    variables["BIGTRAIN_VENV"] = str(Path(bin_directory).parent)
    settings = f"cluster.sbatch_options={json.dumps(options)}"
    done = subprocess.run(
        [*command, settings], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done
    number = done.stdout.split()[1].rstrip(":")
    assert cluster.call("squeue", "--noheader", "--states=all", f"--job={number}", "--format=%k") == comment
    assert f"scancel --batch --signal=USR1 {number}" in done.stdout
    wait_until(lambda: cluster.job(number)["JobState"] in ("COMPLETED", "FAILED"), lambda: str(cluster.job(number)), 60)
    state = cluster.job(number)
    assert (state["JobState"], state["NumNodes"], state["JobName"]) == ("COMPLETED", "2", "gpt_nano")
    assert (tmp_path / "runs/gpt_nano/arguments").read_text().splitlines()[-len(TRAINING) :] == TRAINING


def test_a_mistake_is_named_once_before_anything_starts(cluster: Cluster, tmp_path: Path):
    job = Job(cluster, tmp_path, "--nodes=2", args=[*TRAINING, "train.stpes=1", "train.global_batch_size=7"])
    state = job.wait_for("FAILED", "COMPLETED")
    assert state["ExitCode"] == "2:0"
    assert job.log().count("train.stpes: unknown key; did you mean 'train.steps'?") == 1
    assert not (tmp_path / "runs").exists()


def processes_of(job: Job) -> list[psutil.Process]:
    """Return the agents and ranks of ``job``."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.cwd() == str(job.directory) and "python" in process.name():
                found.append(process)
    return found


def listening_addresses(job: Job) -> set[str]:
    """Return the addresses that the agents and ranks of ``job`` listen on."""
    found = set()
    for process in processes_of(job):
        with contextlib.suppress(psutil.Error):
            connections = process.net_connections(kind="tcp")
            found |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def test_without_slurm_the_tests_say_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda name, **_: None)
    assert "slurm-wlm" in why_not()
