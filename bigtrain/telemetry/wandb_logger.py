"""Weights & Biases as a reader of the run's files, in a companion process (see ``companion.py``).

In the training process wandb would replace ``sys.exit`` and ``sys.excepthook``, record the command line with its
secrets, and hold up the exit for minutes when its server is away.

``<run>/wandb_id`` holds the id of the run, which a resumed run continues; a copied directory gets a new one. So does a
run that went back and came to other numbers: wandb's rewind cannot take back what was logged offline or over custom
axes, so the whole run is logged anew and the old one renamed. The companion is
``python -m bigtrain.telemetry.wandb_logger``.
"""

import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from netrc import NetrcParseError, netrc
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from bigtrain.config import TrainConfig, WandbMode
from bigtrain.config.convert import nearest, to_dict
from bigtrain.errors import first_line
from bigtrain.files import locked, read_json, write_anew
from bigtrain.log import get_logger, redact
from bigtrain.telemetry import names
from bigtrain.telemetry.companion import (
    REQUEST_VARIABLE,
    Companion,
    follow_until_end,
    read_request,
    request_for,
)
from bigtrain.telemetry.text import describe_event

ID_FILE = "wandb_id"
CURSOR_FILE = "wandb_cursor.json"  # also holds the wandb id and the directory that it belongs to

_COMMAND = (sys.executable, "-m", "bigtrain.telemetry.wandb_logger")
_INIT_SECONDS = 60  # after which the server counts as unreachable
_MARGIN_SECONDS = 30
_FINISH_SECONDS = 600  # for uploading after the end of the training
_MAX_SAMPLES = 200
_OVERRULED = {  # of wandb's variables; it reads the others itself
    "WANDB_DIR": "its files go to wandb/ in the run",
    "WANDB_RUN_ID": f"the id of the run is in its file {ID_FILE}",
    "WANDB_RESUME": "a run is always continued",
}
_MODES = {mode: WandbMode[mode] for mode in ("online", "offline", "disabled")}
_MODES |= {"run": WandbMode.online, "dryrun": WandbMode.offline}  # older names of wandb's
_ALERTS = {"fault": "ERROR", "hang": "ERROR", "finished": "INFO"}


def start_wandb(
    run_directory: Path,
    config: TrainConfig,
    *,
    command: Sequence[str] = _COMMAND,
    say: Callable[[str], None] | None = None,
) -> Companion:
    """Start the companion of a run; wandb's files go to ``wandb/`` in the run."""
    wanted = os.environ.get("WANDB_MODE") or "offline"
    if config.logging.wandb is WandbMode.auto and wanted not in _MODES:
        get_logger().warning(f"WANDB_MODE={wanted}: unknown and taken as offline; {nearest(wanted, list(_MODES))}")
    advice = f"; if this machine ends before, upload with: wandb sync {run_directory / 'wandb'}/*run-*"
    return Companion("wandb", command, _request(run_directory, config), say=say, advice=advice)


def _request(run_directory: Path, config: TrainConfig) -> dict[str, Any]:
    return request_for(
        run_directory,
        "wandb",
        name=os.environ.get("WANDB_NAME") or str(config.run.name),
        config=redact(to_dict(config)),
        mode=config.logging.wandb.name,
        project=config.logging.wandb_project or default_project(os.environ),
        entity=config.logging.wandb_entity,
    )


def default_project(environ: Mapping[str, str]) -> str:
    """Return the project of runs whose settings name none."""
    return environ.get("WANDB_PROJECT") or "bigtrain"


def forget(run_directory: Path) -> None:
    """Let the next companion begin a new wandb run: the training begins anew."""
    for name in (ID_FILE, CURSOR_FILE):
        (run_directory / name).unlink(missing_ok=True)


def log_export(run_directory: Path, exported: Path, config: TrainConfig, mode: WandbMode, step: int) -> str:
    """Make a model exported at ``step`` an artifact of the training run's wandb run; return the result in words."""
    import wandb

    mode = _resolve_mode(mode, os.environ, get_logger().info)
    try:
        run = _open_run(wandb, _request(run_directory, config), mode, get_logger().info)
    except wandb.Error as error:
        return f"not made: {error}"
    with run:
        artifact = wandb.Artifact(f"{config.run.name}-export", type="model", metadata={names.STEP: step})
        artifact.add_dir(str(exported))
        run.log_artifact(artifact)
        return run.url if mode is WandbMode.online else _where_offline(run)


def _companion() -> int:
    environ = dict(os.environ)  # before wandb adds to it
    request, say = read_request(environ)
    # The companion of a launch that was killed may not have logged the rest yet.
    with locked(Path(request["log"]), wait=True):
        try:
            import wandb
        except ImportError as error:
            say(f"cannot be used ({error}); the run goes on without")
            return 0
        for name in sorted(_OVERRULED.keys() & environ.keys()):
            say(f"{name} is not used: {_OVERRULED[name]}")
        signal.alarm(_INIT_SECONDS + _MARGIN_SECONDS)  # in case wandb's own time-out fails
        sink = _WandbSink(wandb, request, environ, say)
        signal.alarm(0)
        follow_until_end(sink, request)
        signal.alarm(_FINISH_SECONDS)  # an upload without end is given up; wandb's own files stay
        sink.run.finish()
    return 0


class _WandbSink:
    def __init__(
        self, wandb: ModuleType, request: dict[str, Any], environ: dict[str, str], say: Callable[[str], None]
    ) -> None:
        self._wandb, self._request, self._environ, self._say = wandb, request, environ, say
        self._launch: dict[str, Any] = {}
        self.run = self._begin()

    def _begin(self) -> Any:
        """Begin or continue the wandb run; offline if the server is away. Ends the process if that fails too."""
        mode = _resolve_mode(WandbMode[self._request["mode"]], self._environ, self._say)
        if mode is WandbMode.disabled:
            self._say("switched off by WANDB_MODE or WANDB_DISABLED")
            sys.exit(0)
        try:
            run = _open_run(self._wandb, self._request, mode, self._say)
        except Exception as error:
            reason = first_line(error)
            if mode is WandbMode.offline:
                self._say(f"cannot begin ({reason}); the run goes on without")
                sys.exit(0)
            self._say(f"cannot log online ({reason}); offline instead")
            # In this process wandb would find the run in use, and may hang in its tear-down.
            offline = json.dumps({**self._request, "mode": WandbMode.offline.name})
            os.execve(_COMMAND[0], _COMMAND, {**self._environ, REQUEST_VARIABLE: offline})
        self._say(f"logging to {run.url}" if mode is WandbMode.online else f"logging {_where_offline(run)}")
        return run

    def log(self, row: dict[str, float]) -> None:
        self.run.log(row)

    def event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind in names.LAUNCH_EVENTS:
            # The environment of the newest launch, and what MFU is computed from.
            facts = {key: value for key, value in event.items() if key not in ("event", names.STEP, names.TIME)}
            self._launch = {"launch": redact(facts)}
            self.run.config.update(self._launch, allow_val_change=True)
        is_warning = kind in names.ALARMS or event.get("after")  # a launch whose predecessor failed
        if level := _ALERTS.get(kind) or ("WARN" if is_warning else None):
            text = describe_event(event)
            self.run.alert(f"{self.run.name}: {kind}", text, level=self._wandb.AlertLevel[level], wait_duration=0)

    def samples(self, samples: list[dict[str, Any]]) -> None:
        columns = [names.STEP, "prompt", "text"]
        rows = [[sample.get(column) for column in columns] for sample in samples[-_MAX_SAMPLES:]]
        self.run.log({"samples": self._wandb.Table(columns=columns, data=rows)})

    def take_back(self, step: int, *, differs: bool) -> int | None:
        if not differs:
            return None
        old = self.run
        old.name = f"{self._request['name']} (given up after step {step})"
        old.finish()
        forget(Path(self._request["directory"]))
        self.run = self._begin()
        self.run.config.update({**self._launch, "supersedes": f"{old.id}, after step {step}"}, allow_val_change=True)
        self._say(f"wandb run {old.id} has steps after {step} that were given up; {self.run.id} has the whole run")
        return 0


def _open_run(wandb: ModuleType, request: dict[str, Any], mode: WandbMode, say: Callable[[str], None]) -> Any:
    wanted = {
        "console": "off",
        "silent": True,
        "disable_job_creation": True,
        "init_timeout": _INIT_SECONDS,
        "x_stats_pid": request["training_pid"],
    }
    known = {key: value for key, value in wanted.items() if key in wandb.Settings.model_fields}
    directory = Path(request["directory"])
    (directory / "wandb").mkdir(exist_ok=True)
    with locked(directory / ID_FILE, wait=True) as id_file:  # an export may begin at the same time
        run_id = _find_id(directory, id_file, say)
        # wandb names directories by second and id: wait for a free name.
        while any(directory.glob(f"wandb/*run-{datetime.now():%Y%m%d_%H%M%S}-{run_id}")):
            time.sleep(0.05)
        run = wandb.init(
            dir=request["directory"],
            id=run_id,
            resume="allow",
            mode=mode.name,
            name=request["name"],
            project=request["project"],
            entity=request["entity"],
            config=request["config"],
            allow_val_change=True,
            settings=wandb.Settings(**known),
        )
    for axis in names.AXES:
        run.define_metric(axis)
    for section in names.SECTIONS:
        run.define_metric(f"{section}/*", step_metric=names.STEP)
    run.define_metric("val/loss", step_metric=names.STEP, summary="min")
    return run


def _find_id(directory: Path, file: BinaryIO, say: Callable[[str], None]) -> str:
    """Return the run's wandb id, a new one if it has none or the directory is a copy."""
    file.seek(0)
    run_id, here, cursor = file.read().decode().strip(), _place(directory), read_json(directory / CURSOR_FILE)
    if cursor.get("id", run_id) != run_id:
        cursor = {}
    if run_id and _is_copy(run_id, cursor.get("place"), here):
        say(
            f"{directory} is a copy of {cursor['place']['path']}, which stays wandb run {run_id}; the copy is a new one"
        )
        run_id = ""
    if not run_id:
        run_id, cursor = secrets.token_hex(4), {}
        file.truncate(0)
        file.write(f"{run_id}\n".encode())
        file.flush()
    told = cursor | {"id": run_id, "place": here}
    if told != cursor:  # otherwise leave it to the companion, which may be writing it
        write_anew(directory / CURSOR_FILE, json.dumps(told))
    return run_id


def _place(directory: Path) -> dict[str, Any]:
    status = directory.stat()
    return {"path": str(directory.resolve()), "device": status.st_dev, "inode": status.st_ino}


def _is_copy(run_id: str, place: dict[str, Any] | None, here: dict[str, Any]) -> bool:
    """Return whether a directory once at ``place`` was copied rather than moved from there."""
    if place is None or here["path"] == place["path"] or here["inode"] == place["inode"]:
        return False
    if here["device"] == place["device"]:
        return True
    original = Path(place["path"], ID_FILE)  # moved between file systems, it is gone
    return original.exists() and original.read_text().strip() == run_id


def _where_offline(run: Any) -> str:
    return f"offline; upload with: wandb sync {Path(run.dir).parent}"


def _resolve_mode(mode: WandbMode, environ: Mapping[str, str], say: Callable[[str], None]) -> WandbMode:
    """Return ``online``, ``offline`` or ``disabled``; without a key it is never ``online``: wandb would ask for one."""
    if mode is WandbMode.auto:
        usual = WandbMode.online if has_api_key(environ) else WandbMode.offline
        mode = _MODES.get(environ["WANDB_MODE"], WandbMode.offline) if environ.get("WANDB_MODE") else usual
        mode = WandbMode.disabled if environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on") else mode
    if mode is WandbMode.online and not has_api_key(environ):
        say("logging.wandb=online, but there is no key (set WANDB_API_KEY or run `wandb login`); offline instead")
        return WandbMode.offline
    return mode


def has_api_key(environ: Mapping[str, str]) -> bool:
    """Return whether wandb would find a key, in the environment or in the netrc file."""
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
