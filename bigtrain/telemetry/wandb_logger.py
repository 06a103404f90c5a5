"""Weights & Biases as a reader of the run's files, in a process of its own.

wandb in the training process would take its interpreter, replace ``sys.exit`` and ``sys.excepthook``,
record the command line with whatever secrets are in it, and hold up the exit for seconds to minutes
when its server is away. Here the training process starts a companion, and that is all it ever does:
the companion follows ``metrics.jsonl`` and ``events.jsonl``, so it can be as slow as it likes, and nothing
is lost when it is. It ends when the training process ends, however that happens, after it has logged
what is in the files.

``<run>/wandb_id`` holds the id of the run and ``<run>/wandb_cursor.json`` how far it is logged: a resumed
run continues both, and steps that it repeats are not logged again.

The companion is ``python -m bigtrain.telemetry.wandb_logger``. An environment variable holds what it is to do, as
JSON; a line on standard input, or its end, says that the training has ended.
"""

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from bigtrain.config import WandbMode
from bigtrain.log import get_logger
from bigtrain.redact import redact
from bigtrain.telemetry import names
from bigtrain.telemetry.files import Tail

ID_FILE = "wandb_id"
CURSOR_FILE = "wandb_cursor.json"
LOG_FILE = "log/wandb.log"

_REQUEST_VARIABLE = "BIGTRAIN_WANDB_REQUEST"
_COMMAND = (sys.executable, "-m", "bigtrain.telemetry.wandb_logger")
_POLL_SECONDS = 0.5
_INIT_SECONDS = 60  # then the server counts as away
_MARGIN_SECONDS = 30
_FINISH_SECONDS = 600  # of uploading after the end of the training


class WandbLogger:
    """Starts and ends the companion; no call waits for it, and no failure of it is more than a message."""

    def __init__(
        self,
        run_directory: Path,
        run_name: str,
        config_dict: dict[str, Any],
        mode: WandbMode,
        project: str,
        entity: str | None,
        command: Sequence[str] = _COMMAND,
        say: Callable[[str], None] | None = None,
    ) -> None:
        """Start the companion.

        Args:
            run_directory: Directory of the run; wandb's files go to ``wandb/`` in it.
            run_name: Name shown on the dashboard.
            config_dict: Configuration as plain data; secrets are taken out here.
            mode: ``auto`` is what ``WANDB_MODE`` says, otherwise online with a key and offline without one.
            project: Weights & Biases project.
            entity: Weights & Biases user or team.
            command: The companion's command line.
            say: Receives the companion's messages, from another thread; by default the project's log.
        """
        self._run_directory = run_directory
        self._say = say or get_logger().info
        request = {
            "directory": str(run_directory.absolute()),
            "name": run_name,
            "config": redact(config_dict),
            "mode": mode.name,
            "project": project,
            "entity": entity,
            "training_pid": os.getpid(),
        }
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = _start(command, request, run_directory / LOG_FILE)
        except OSError as error:
            self._say(f"wandb: cannot start it ({error}); the run goes on without")
            return
        self._listener = threading.Thread(target=self._listen, args=(self._process,), daemon=True)
        self._listener.start()

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        for line in process.stdout:
            self._say(f"wandb: {line.rstrip()}")
        if process.wait() != 0:
            self._say(f"wandb: stopped; the run goes on without; see {self._run_directory / LOG_FILE}")

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Tell the companion that the training has ended and wait so long at most; then it goes on alone."""
        if self._process is None:
            return
        try:
            self._process.stdin.write("end\n")
            self._process.stdin.close()
        except OSError:  # it ended before
            pass
        try:
            self._process.wait(timeout_seconds)
            self._listener.join(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._say(
                f"wandb: still busy in the background (process {self._process.pid}); if this machine ends before, "
                f"upload with: wandb sync {self._run_directory / 'wandb'}/*run-*"
            )


def _start(command: Sequence[str], request: dict[str, Any], log_path: Path) -> "subprocess.Popen[str]":
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("a") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, _REQUEST_VARIABLE: json.dumps(request)},
            start_new_session=True,  # Ctrl-C at the terminal is for the training process only
        )


def forget(run_directory: Path) -> None:
    """Let the next companion begin a new wandb run, because the training begins anew."""
    for name in (ID_FILE, CURSOR_FILE):
        (run_directory / name).unlink(missing_ok=True)


def _companion() -> int:
    """Follow the files of a run until the training process ends."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Slurm sends it to all processes of a job; it is for the ranks
    environ = dict(os.environ)  # before wandb adds to it
    request = json.loads(environ[_REQUEST_VARIABLE])
    messages, sys.stdout = sys.stdout, sys.stderr

    def say(text: str) -> None:
        try:
            print(text, file=messages, flush=True)
        except OSError:  # the training process is gone
            print(text, file=sys.stderr)

    try:
        import wandb
    except ImportError as error:
        say(f"cannot be used ({error}); the run goes on without")
        return 0
    signal.alarm(_INIT_SECONDS + _MARGIN_SECONDS)  # in case wandb's own time-out fails
    run = _init(wandb, request, environ, say)
    if run is None:
        return 0
    signal.alarm(0)
    follower = _Follower(Path(request["directory"]), run.log)
    has_ended = False
    while not has_ended:
        has_ended = bool(select.select([sys.stdin], [], [], _POLL_SECONDS)[0])
        has_ended = has_ended or os.getppid() != request["training_pid"]
        follower.log_new()
    signal.alarm(_FINISH_SECONDS)  # nobody waits for an upload without end; wandb's own files stay
    run.finish()
    return 0


def _init(wandb: ModuleType, request: dict[str, Any], environ: dict[str, str], say: Callable[[str], None]) -> Any:
    """Begin or continue the wandb run; offline if the server is away, None if that fails too."""
    mode = _resolve_mode(WandbMode[request["mode"]], environ)
    if mode is WandbMode.disabled:
        say("switched off by WANDB_MODE")
        return None
    if mode is WandbMode.online and not has_api_key(environ):
        say("logging.wandb=online, but there is no key (set WANDB_API_KEY or run `wandb login`); offline instead")
        mode = WandbMode.offline
    try:
        run = _open_run(wandb, request, mode)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        if mode is WandbMode.offline:
            say(f"cannot begin ({reason[0]}); the run goes on without")
            return None
        say(f"cannot log online ({reason[0]}); offline instead")
        # In this process wandb would find the run in use, and may hang in its tear-down.
        offline = json.dumps({**request, "mode": WandbMode.offline.name})
        os.execve(_COMMAND[0], _COMMAND, {**environ, _REQUEST_VARIABLE: offline})
    if mode is WandbMode.online:
        say(f"logging to {run.url}")
    else:
        say(f"logging offline; upload with: wandb sync {Path(run.dir).parent}")
    return run


def _open_run(wandb: ModuleType, request: dict[str, Any], mode: WandbMode) -> Any:
    wanted = {
        "console": "off",
        "silent": True,
        "disable_job_creation": True,
        "init_timeout": _INIT_SECONDS,
        "x_stats_pid": request["training_pid"],
    }
    known = {key: value for key, value in wanted.items() if key in wandb.Settings.model_fields}
    run = wandb.init(
        dir=request["directory"],
        id=_run_id(Path(request["directory"])),
        resume="allow",
        mode=mode.name,
        name=request["name"],
        project=request["project"],
        entity=request["entity"],
        config=request["config"],
        allow_val_change=True,
        settings=wandb.Settings(**known),
    )
    for axis in (names.STEP, names.TOKENS):
        run.define_metric(axis)
    for section in ("train", "val", "perf"):
        run.define_metric(f"{section}/*", step_metric=names.STEP)
    return run


def _run_id(directory: Path) -> str:
    path = directory / ID_FILE
    if not path.exists():
        path.write_text(f"{secrets.token_hex(4)}\n")
    return path.read_text().strip()


class _Follower:
    """Logs what is new in the files of a run, each step once."""

    def __init__(self, directory: Path, log: Callable[[dict[str, Any]], None]) -> None:
        self._metrics = Tail(directory / "metrics.jsonl")
        self._events = Tail(directory / "events.jsonl")
        self._cursor_path = directory / CURSOR_FILE
        self._log = log
        self._cursor = {"train": 0, "val": 0}
        if self._cursor_path.exists():
            self._cursor = json.loads(self._cursor_path.read_text())

    def log_new(self) -> None:
        while records := self._metrics.read():
            self._log_after_cursor("train", records)
        while records := self._events.read():
            self._log_after_cursor("val", [record for record in records if record["event"] == "validation"])

    def _log_after_cursor(self, section: str, records: list[dict[str, Any]]) -> None:
        fresh = [record for record in records if record[names.STEP] > self._cursor[section]]
        if not fresh:
            return
        # The cursor moves first: after a crash in between, a step is missing on the dashboard rather than doubled.
        self._cursor[section] = max(record[names.STEP] for record in fresh)
        self._save_cursor()
        for record in fresh:
            self._log({names.dashboard_name(key, section): value for key, value in _numbers(record).items()})

    def _save_cursor(self) -> None:
        temporary = self._cursor_path.with_name(CURSOR_FILE + ".tmp")
        with temporary.open("w") as file:
            json.dump(self._cursor, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._cursor_path)


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    non_finite = {key: float(text) for key, text in record.get("non_finite", {}).items()}
    return {key: value for key, value in {**record, **non_finite}.items() if isinstance(value, (int, float))}


def _resolve_mode(mode: WandbMode, environ: Mapping[str, str]) -> WandbMode:
    if mode is not WandbMode.auto:
        return mode
    if environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return WandbMode[environ["WANDB_MODE"]]
    return WandbMode.online if has_api_key(environ) else WandbMode.offline


def has_api_key(environ: Mapping[str, str]) -> bool:
    """Return whether wandb would find a key: in the environment or in the netrc file, as ``wandb login`` leaves it."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    home = Path(environ.get("HOME", "~")).expanduser()
    paths = [Path(environ["NETRC"])] if "NETRC" in environ else [home / ".netrc", home / "_netrc"]
    for path in paths:
        try:
            if netrc(path).authenticators(host):
                return True
        except (OSError, NetrcParseError):
            continue
    return False


if __name__ == "__main__":
    sys.exit(_companion())
