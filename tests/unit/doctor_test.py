"""``bigtrain doctor``: a line a check, and what to do where something is missing."""

import http.server
import resource
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from bigtrain.cli import doctor


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def lines(directory: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    code = doctor.run(doctor.DoctorConfig(directory=str(directory)))
    return code, {line[2:].split()[0]: line for line in capsys.readouterr().out.splitlines()}


def test_a_machine_that_lacks_nothing(offline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    roomy = namedtuple("roomy", "total used free")(2**50, 0, 2**50)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: roomy)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/c++")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65536, 65536))
    code, said = lines(tmp_path, capsys)
    assert code == 0
    assert " ".join(said) == "versions GPUs network processor compiler descriptors /dev/shm locks disk hub wandb"
    assert "torch 2." in said["versions"]
    assert "not reached; without it: HF_HUB_OFFLINE=1" in said["hub"]
    assert not any(line.startswith("!") for line in said.values())


def test_what_is_missing_is_named_with_the_way_out(
    offline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: namedtuple("full", "total used free")(2**26, 0, 2**26))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    monkeypatch.setattr(doctor, "try_lock", lambda file, path: None)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere7")
    code, said = lines(tmp_path, capsys)
    assert code == 2
    ill = " ".join(name for name, line in said.items() if line.startswith("!"))
    assert ill == "network compiler descriptors /dev/shm locks disk"
    assert "ulimit -n 4096" in said["descriptors"]
    assert "--shm-size" in said["/dev/shm"]
    assert "nowhere7" in said["network"]


def test_a_directory_that_cannot_be_written_is_named(offline: None, capsys: pytest.CaptureFixture[str]):
    code, said = lines(Path("/proc"), capsys)
    assert code == 2
    assert "/proc cannot be written" in said["locks"]


def test_a_server_that_answers_with_an_error_is_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # 501 to everything
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    try:
        said = lines(tmp_path, capsys)[1]
    finally:
        server.shutdown()
    assert said["hub"].endswith("reached")
    assert "not reached" in said["wandb"]
