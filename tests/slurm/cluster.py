"""A real Slurm cluster of several nodes on this machine: munge, slurmctld, and one slurmd per node.

A node is a process tree with its own process ids, host name, mounts and loopback address, so that it can lose its power
like a machine. That needs root, and Debian's packages slurm-wlm and munge; Debian builds slurmd so that many
of them run side by side. Nothing outlives the test process: the kernel ends the daemons with it.
"""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare", "setpriv")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
DIES_WITH_US = ("setpriv", "--pdeathsig=KILL", "--")
# Process 1 of a node. It mounts what makes the node look like a machine, and reaps what jobs leave behind.
NODE = """
mount --make-rprivate / && mount -t proc proc /proc && hostname "$1" &&
  mount --bind "$2/hosts" /etc/hosts && mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf &&
  mount -t tmpfs tmpfs /dev/shm || exit
slurmd -D -N "$1" & wait $!
"""
# No accounting, no control groups, and reactions within seconds. cred_expire is also the wait before a requeued job runs.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
MessageTimeout=5
TCPTimeout=2
SlurmdTimeout=10
KillWait=30
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=node[1-{num_nodes}] Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=node[1-{num_nodes}] MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=gpu Nodes=gpunode MaxTime=INFINITE
"""
GPUS = ("/dev/null", "/dev/zero")  # any devices do


def why_not() -> str | None:
    """Return why no cluster can be started here, or None if one can."""
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=PATH)]:
        return f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge"
    probe = ["unshare", "--pid", "--fork", "--uts", "--mount", "--kill-child", "true"]
    if os.geteuid() != 0 or subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        return "nodes need root and the right to make namespaces"
    return None


class Cluster:
    """The cluster; entering starts it, leaving ends it and everything that runs on it."""

    def __init__(self, num_nodes: int) -> None:
        """Plan ``num_nodes`` nodes ``node1 ...`` and one more, ``gpunode``, whose GPUs exist on paper."""
        self._num_nodes = num_nodes
        self._addresses = {name: f"127.90.0.{10 + i}" for i, name in enumerate(self._names(), start=1)}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def _names(self) -> list[str]:
        return [*(f"node{i}" for i in range(1, self._num_nodes + 1)), "gpunode"]

    def __enter__(self) -> "Cluster":
        self.directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # unix sockets need a short path
        self.directory.chmod(0o755)  # munged asks for it
        self.environ = {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.directory / "slurm.conf"), "LC_ALL": "C"}
        try:
            self._write_files()
            self._start_controller()
            for name in self._names():
                self.start_node(name)
            wait_until(lambda: self.states().count("idle") == self._num_nodes + 1, self._trouble, 30)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes.values()):
            process.kill()
            process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _write_files(self) -> None:
        (self.directory / "state").mkdir()
        ports = free_ports(self._num_nodes + 2)
        host = socket.gethostname().split(".")[0]
        nodes = [
            f"NodeName={name} NodeAddr={address} Port={port} CPUs=8 RealMemory=64000"
            + (f" Gres=gpu:{len(GPUS)}" if name == "gpunode" else "")
            for (name, address), port in zip(self._addresses.items(), ports[1:], strict=True)
        ]
        conf = CONF.format(host=host, port=ports[0], directory=self.directory, num_nodes=self._num_nodes)
        (self.directory / "slurm.conf").write_text("\n".join([conf, *nodes, ""]))
        hosts = {"localhost": "127.0.0.1", host: "127.0.0.1", **self._addresses}
        (self.directory / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        (self.directory / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
        gpus = "".join(f"NodeName=gpunode Name=gpu File={device}\n" for device in GPUS)
        (self.directory / "gres.conf").write_text(gpus)
        key = self.directory / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)

    def _start_controller(self) -> None:
        directory = self.directory
        if "munged" not in self._processes:
            files = [f"--{kind}-file={directory}/munge.{kind}" for kind in ("key", "log", "pid", "seed")]
            self._start("munged", "munged", "-F", f"--socket={directory}/munge.sock", *files)
            wait_until((directory / "munge.sock").exists, self._trouble, 10)
        as_node = 'mount --make-rprivate / && mount --bind "$0" /etc/hosts && exec slurmctld -D'
        self._start("slurmctld", "unshare", "--mount", "sh", "-c", as_node, f"{directory}/hosts")
        wait_until(lambda: "UP" in self.call("scontrol", "ping"), self._trouble, 10)

    def _start(self, name: str, *command: str) -> None:
        with (self.directory / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                [*DIES_WITH_US, *command], env=self.environ, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def start_node(self, name: str) -> None:
        """Switch a node on."""
        namespaces = ["unshare", "--pid", "--fork", "--uts", "--mount", "--kill-child"]
        self._start(name, *namespaces, "bash", "-c", NODE, "node", name, str(self.directory))

    def kill_node(self, name: str) -> None:
        """Cut a node's power: every process on it is gone, and nobody is told."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def freeze_node(self, name: str) -> None:
        """Cut a node off: nothing on it moves, and nobody is told."""
        for process in self._tree(name):
            process.suspend()

    def thaw_node(self, name: str) -> None:
        """Let a node that was cut off go on where it was."""
        for process in self._tree(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def _tree(self, name: str) -> list[psutil.Process]:
        return psutil.Process(self._processes[name].pid).children(recursive=True)

    def restart_controller(self, *settings: str) -> None:
        """Start slurmctld anew, which keeps its jobs, with more settings."""
        with (self.directory / "slurm.conf").open("a") as conf:
            conf.write("\n".join([*settings, ""]))
        controller = self._processes.pop("slurmctld")
        controller.terminate()
        controller.wait(30)
        self._start_controller()

    def call(self, *command: str, **environ: str) -> str:
        """Run a command of Slurm's and return what it says."""
        done = subprocess.run(
            command, env=self.environ | environ, capture_output=True, text=True, timeout=30, check=False
        )
        return (done.stdout + done.stderr).strip()

    def states(self) -> list[str]:
        """Return the state of every node."""
        return self.call("sinfo", "--noheader", "--partition=main,gpu", "--Node", "--format=%T").split()

    def job(self, number: str) -> dict[str, str]:
        """Return what the controller knows of a job."""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _trouble(self) -> str:
        log = self.directory / "slurmctld.out"
        said = log.read_text(errors="replace")[-3000:] if log.exists() else ""
        return f"{self.call('sinfo', '--Node', '--long')}\n{said}"


def wait_until(condition: Callable[[], bool], trouble: Callable[[], str], timeout_seconds: float) -> None:
    """Wait until ``condition`` holds; fail with what ``trouble`` says."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_seconds} s:\n{trouble()}"
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports
