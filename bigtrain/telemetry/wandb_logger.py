"""Weights & Biases as a reader of the run's files, in a companion process (see ``companion.py``).

In the training process wandb would replace ``sys.exit`` and ``sys.excepthook``, record the command line with whatever
secrets are in it, and hold up the exit for seconds to minutes when its server is away.

``<run>/wandb_id`` holds the id of the run, which a resumed run continues. The companion is
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
from typing import Any, TextIO
from urllib.parse import urlsplit

from bigtrain.config import TrainConfig, WandbMode
from bigtrain.redact import redact
from bigtrain.schema import to_dict
from bigtrain.telemetry import names
from bigtrain.telemetry.companion import REQUEST_VARIABLE, Companion, follow_until_end, lock, read_request, request_for
from bigtrain.telemetry.text import describe_event

ID_FILE = "wandb_id"

_COMMAND = (sys.executable, "-m", "bigtrain.telemetry.wandb_logger")
_INIT_SECONDS = 60  # then the server counts as away
_MARGIN_SECONDS = 30
_FINISH_SECONDS = 600  # of uploading after the end of the training
_MAX_SAMPLES = 200
_OVERRULED = {  # of wandb's variables; it reads the others itself
    "WANDB_DIR": "its files go to wandb/ in the run",
    "WANDB_RUN_ID": f"the id of the run is in its file {ID_FILE}",
    "WANDB_RESUME": "a run is always continued",
}
_MODES = {mode: WandbMode[mode] for mode in ("online", "offline", "disabled")}
_MODES |= {"run": WandbMode.online, "dryrun": WandbMode.offline}  # wandb's older words
_ALERTS = {"fault": "ERROR", "hang": "ERROR", "finished": "INFO"}


def start_wandb(
    run_directory: Path,
    config: TrainConfig,
    *,
    command: Sequence[str] = _COMMAND,
    say: Callable[[str], None] | None = None,
) -> Companion:
    """Start the companion of a run, with a configuration without secrets; wandb's files go to ``wandb/`` in the run."""
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
    """Return the project where no setting names one."""
    return environ.get("WANDB_PROJECT") or "bigtrain"


def forget(run_directory: Path) -> None:
    """Let the next companion begin a new wandb run, because the training begins anew."""
    for name in (ID_FILE, "wandb_cursor.json"):
        (run_directory / name).unlink(missing_ok=True)


def log_export(run_directory: Path, exported: Path, config: TrainConfig, mode: WandbMode, step: int) -> str:
    """Make an exported model an artifact of the wandb run of a training run; return what came of it, for people.

    Args:
        run_directory: Directory of the training run.
        exported: Directory of the exported model.
        config: Configuration of the training run.
        mode: ``auto`` is what ``WANDB_MODE`` says, otherwise online with a key and offline without one.
        step: Optimizer step of the checkpoint that was exported.
    """
    import wandb

    mode = _resolve_mode(mode, os.environ)
    if mode is WandbMode.online and not has_api_key(os.environ):  # wandb would ask for one
        mode = WandbMode.offline
    try:
        run = _open_run(wandb, _request(run_directory, config), mode)
    except wandb.Error as error:
        return f"not made: {error}"
    with run:
        artifact = wandb.Artifact(f"{config.run.name}-export", type="model", metadata={names.STEP: step})
        artifact.add_dir(str(exported))
        run.log_artifact(artifact)
        return run.url if mode is WandbMode.online else f"offline; upload with: wandb sync {Path(run.dir).parent}"


def _companion() -> int:
    """Follow the files of a run until the training process ends."""
    environ = dict(os.environ)  # before wandb adds to it
    request, say = read_request(environ)
    # The companion of a launch that was killed may not have logged the rest yet.
    with lock(Path(request["log"])):
        try:
            import wandb
        except ImportError as error:
            say(f"cannot be used ({error}); the run goes on without")
            return 0
        for name in sorted(_OVERRULED.keys() & environ.keys()):
            say(f"{name} is not used: {_OVERRULED[name]}")
        signal.alarm(_INIT_SECONDS + _MARGIN_SECONDS)  # in case wandb's own time-out fails
        run = _init(wandb, request, environ, say)
        if run is None:
            return 0
        signal.alarm(0)
        follow_until_end(_WandbSink(wandb, run), request)
        signal.alarm(_FINISH_SECONDS)  # nobody waits for an upload without end; wandb's own files stay
        run.finish()
    return 0


class _WandbSink:
    """See :class:`bigtrain.telemetry.companion.Sink`."""

    def __init__(self, wandb: ModuleType, run: Any) -> None:
        self._wandb = wandb
        self._run = run

    def log(self, row: dict[str, float]) -> None:
        self._run.log(row)

    def event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind in names.LAUNCH_EVENTS:
            # The environment of the newest launch, and what MFU is computed from.
            facts = {key: value for key, value in event.items() if key not in ("event", names.STEP, names.TIME)}
            self._run.config.update({"launch": redact(facts)}, allow_val_change=True)
        is_warning = kind in names.ALARMS or event.get("after")  # a launch that tells why the one before it failed
        if level := _ALERTS.get(kind) or ("WARN" if is_warning else None):
            text = describe_event(event)
            self._run.alert(f"{self._run.name}: {kind}", text, level=self._wandb.AlertLevel[level], wait_duration=0)

    def samples(self, samples: list[dict[str, Any]]) -> None:
        columns = [names.STEP, "prompt", "text"]
        rows = [[sample.get(column) for column in columns] for sample in samples[-_MAX_SAMPLES:]]
        self._run.log({"samples": self._wandb.Table(columns=columns, data=rows)})


def _init(wandb: ModuleType, request: dict[str, Any], environ: dict[str, str], say: Callable[[str], None]) -> Any:
    """Begin or continue the wandb run; offline if the server is away, None if that fails too."""
    mode = _resolve_mode(WandbMode[request["mode"]], environ)
    if mode is WandbMode.disabled:
        say("switched off by WANDB_MODE or WANDB_DISABLED")
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
        os.execve(_COMMAND[0], _COMMAND, {**environ, REQUEST_VARIABLE: offline})
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
    directory = Path(request["directory"])
    (directory / "wandb").mkdir(exist_ok=True)
    with lock(directory / ID_FILE) as id_file:  # an export may begin at the same time
        run = wandb.init(
            dir=request["directory"],
            id=_find_id(id_file),
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
    for section in names.SECTIONS:
        run.define_metric(f"{section}/*", step_metric=names.STEP)
    run.define_metric("val/loss", step_metric=names.STEP, summary="min")
    return run


def _find_id(file: TextIO) -> str:
    """Return the id of the run, when wandb, which calls a directory after it and the second, has a name for one more."""
    file.seek(0)
    run_id = file.read().strip()
    if not run_id:
        run_id = secrets.token_hex(4)
        file.write(f"{run_id}\n")
        file.flush()
    wandb_directory = Path(file.name).parent / "wandb"
    while any(wandb_directory.glob(f"*run-{datetime.now():%Y%m%d_%H%M%S}-{run_id}")):
        time.sleep(0.05)
    return run_id


def _resolve_mode(mode: WandbMode, environ: Mapping[str, str]) -> WandbMode:
    if mode is not WandbMode.auto:
        return mode
    if environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return WandbMode.disabled
    if wanted := environ.get("WANDB_MODE"):
        return _MODES.get(wanted, WandbMode.offline)
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
