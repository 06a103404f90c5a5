"""The lease of a launch on its run: signs of life, a lock where there are locks, and who may take over.

A lock is not enough: it may be local to a node or without effect (Lustre ``localflock``, NFS ``local_lock``), and a
node that is cut off may keep it while Slurm has queued the job again elsewhere. So the file says who has the run, and
its holder counts up a number in it every 3 s. A lock that is taken proves that its holder is there; one that is free proves
nothing but on the machine that had it. Otherwise whoever comes watches the number, with no clock but its own, and takes
over when it has stood still for 30 s.

To take over is to create ``<file>.<n>``, one above all numbers that there are, which only one of several can (O_EXCL); to
remove lower ones; to look whether all is still as judged; and to rename it to the file, which fails if somebody with a
higher number has removed it meanwhile. A holder that was cut off looks before each sign of life whether the file is still
its own, and ends: two launches have a run at once for as long as it takes until that look, 3 s.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bigtrain.errors import EXIT_NO_RESTART, ConfigError
from bigtrain.files import try_lock
from bigtrain.log import get_logger

BEAT_SECONDS = 3.0
LEASE_SECONDS = 30.0
"""A holder without a sign of life for so long is cut off."""
PATIENCE_SECONDS = 600.0
"""So long a restart waits for a holder that is alive: its watchdog may have to notice that other nodes are gone, which
takes three times the longest phase."""
_LOOK_SECONDS = 1.0
_BEAT_OFFSET, _BEAT_WIDTH = len('{"beat": "'), 12
_RELEASED = "released"


class Lease:
    """The open file of a run that this launch has; let go at the latest when the process ends."""

    def __init__(self, path: Path, file: int, content: bytes) -> None:
        """Take the open ``file`` at ``path`` with this launch's ``content``."""
        self._path, self._file = path, file
        self._record = _parse(content)
        self._num_beats = 0
        self._released = threading.Event()
        self._lock = threading.Lock()  # the number of a closed file may be another file's
        self._directory = os.open(path.parent, os.O_RDONLY)  # stays the run's when it is renamed

    def write(self, values: Mapping[str, Any]) -> None:
        """Let the file say ``values`` besides who has the run.

        Raises:
            OSError: it cannot be written.
        """
        self._record = {**self._record, **values}
        content = _encode(self._record)
        os.pwrite(self._file, content, 0)
        os.ftruncate(self._file, len(content))

    def keep(self, on_move: Callable[[], None] = lambda: None) -> None:
        """Give signs of life from now on; end this process when another launch has taken over.

        Args:
            on_move: called when the directory is found renamed or removed.
        """
        threading.Thread(target=self._beat, args=(on_move,), daemon=True).start()

    def release(self) -> None:
        """Let go."""
        with self._lock, contextlib.suppress(OSError):
            self._released.set()
            self._sign(_RELEASED)
            os.close(self._file)
            os.close(self._directory)

    def is_here(self) -> bool:
        """Return whether the directory at the path is still the run's, and the run this launch's."""
        return _read(self._path).get("id") == self._record["id"]

    def has_moved(self) -> bool:
        """Return whether the run's directory is not at its path any more; another one may be."""
        if self.is_here():
            return False
        try:
            return not os.path.samestat(os.fstat(self._directory), os.stat(self._path.parent))
        except FileNotFoundError:
            return True

    def follow(self) -> Path:
        """Return where the run's directory is now, and hold it there; a removed one is made anew beside its old place.

        Raises:
            OSError: it cannot be made.
        """
        with self._lock:
            if not self.is_here() and self.has_moved():
                if place := self._find():
                    self._path = place / self._path.name
                else:
                    self._make_anew()
            return self._path.parent

    def _find(self) -> Path | None:
        parent, places = self._path.parent, []
        with contextlib.suppress(OSError):
            places.append(Path(os.readlink(f"/proc/self/fd/{self._directory}")))
        with contextlib.suppress(OSError):
            places += parent.parent.iterdir()
        return next((p for p in places if _read(p / self._path.name).get("id") == self._record["id"]), None)

    def _make_anew(self) -> None:
        old = self._path.parent
        names = (old.with_name(f"{old.name}-rescued{tail}") for tail in ("", *(f"-{n}" for n in range(2, 1000))))
        place = next(name for name in names if not name.exists())
        place.mkdir(parents=True)
        self._path = place / self._path.name
        os.close(self._directory)
        self._directory = os.open(place, os.O_RDONLY)
        self._put_back()

    def give_sign(self, on_move: Callable[[], None]) -> None:
        """Look whether the run is still this launch's, and say that it lives.

        Raises:
            OSError: the file server does not answer.
        """
        if not self.is_here():
            if self.has_moved():
                on_move()
            elif not self._path.exists():  # to remove the file is not to take over
                self._put_back()
            else:
                _end_cut_off(self._path)
        self._num_beats += 1
        self._sign(f"{self._num_beats:0{_BEAT_WIDTH}d}")

    def _beat(self, on_move: Callable[[], None]) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with self._lock, contextlib.suppress(OSError):
                if not self._released.is_set():
                    self.give_sign(on_move)

    def _sign(self, text: str) -> None:
        try:
            os.pwrite(self._file, f"{text:<{_BEAT_WIDTH}}".encode(), _BEAT_OFFSET)
        except OSError:  # a full disk of a file system that copies on write
            os.utime(self._file)

    def _put_back(self) -> None:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        os.close(self._file)
        self._file = file
        try_lock(file, self._path)
        self.write({})


def take_lease(path: Path, *, patient: bool, hurry: bool = False) -> Lease:
    """Take the run whose file is ``path``.

    Args:
        path: its content says who has it: ``pid``, ``host`` and ``time``.
        patient: whether to wait for a holder that lives; one that seems to be silent is waited for in any case.
        hurry: whether to wait for nobody.

    Raises:
        ConfigError: another process has it and is alive.
        OSError: the file cannot be opened.
    """
    sign: tuple[Any, ...] | None = None
    waited, silent, is_heard = 0.0, 0.0, False
    while True:
        content, lock, touched = _look(path)
        newest = max([int(_parse(content).get("hold", 0)), *_claims(path)])
        before, sign = sign, (content, touched, newest)
        # Only looks that succeed count: while the file server is away, neither side can say or hear anything.
        silent = silent + _LOOK_SECONDS if sign == before else 0.0
        is_heard = is_heard or before not in (None, sign)
        is_cut_off = silent >= LEASE_SECONDS
        if is_cut_off or _is_free(content, lock, newest):
            if is_cut_off:
                get_logger().warning(f"{_in_use(path, content)} gives no sign of life any more: taken over")
            if lease := _seize(path, content, newest + 1):
                return lease
            continue
        # Another machine's clock only decides whether a taken lock is waited for; who looks takes it for a moment.
        seems_silent = (
            lock != "taken" or _is_released(_parse(content)) or time.time() - (touched or 0) / 1e9 > LEASE_SECONDS
        )
        if hurry or not (patient or (seems_silent and not is_heard)) or waited > PATIENCE_SECONDS:
            advice = "wait for its end, stop it, or choose another run.name"
            raise ConfigError(f"{_in_use(path, content)}; {advice}")
        if waited == 0:
            get_logger().warning(f"{_in_use(path, content)}: waiting for its end or its silence")
        time.sleep(_LOOK_SECONDS)
        waited += _LOOK_SECONDS


def _look(path: Path) -> tuple[bytes | None, str, int | None]:
    """Return the content of the file, how its lock is, and when it was written.

    The lock is ``taken`` by a process that lives, ``ours`` where it excludes others at least on this machine, or ``free``,
    which means nothing.
    """
    try:
        file = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None, "free", None
    try:
        lock = {True: "ours", False: "taken", None: "free"}[try_lock(file, path)]
        if lock == "ours":
            again = os.open(path, os.O_RDWR)
            try:
                lock = "free" if try_lock(again, path) else "ours"
            finally:
                os.close(again)
        return os.pread(file, 1 << 16, 0), lock, os.fstat(file).st_mtime_ns
    finally:
        os.close(file)


def _is_free(content: bytes | None, lock: str, newest: int) -> bool:
    """Return whether nobody has the run for certain, nor is about to take it."""
    record = _parse(content)
    if newest > int(record.get("hold", 0)):
        return False
    return (
        content is None or _is_released(record) or (lock == "ours" and record.get("machine", _machine()) == _machine())
    )


def _is_released(record: Mapping[str, Any]) -> bool:
    return str(record.get("beat", "")).strip() == _RELEASED


def _seize(path: Path, judged: bytes | None, number: int) -> Lease | None:
    """Take the run as it was judged; None if somebody else moves too."""
    claim = path.with_name(f"{path.name}.{number}")
    with contextlib.suppress(FileExistsError):
        file = os.open(claim, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            owner = {"hold": number, "id": uuid.uuid4().hex, "machine": _machine()}
            owner |= {"host": socket.gethostname(), "pid": os.getpid(), "time": time.strftime("%FT%T%z")}
            content = _encode({**_parse(judged), **owner})
            try_lock(file, path)
            os.pwrite(file, content, 0)
            for lower in _claims(path):
                if lower < number:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path.with_name(f"{path.name}.{lower}"))
            if _content(path) == judged and max(_claims(path), default=0) == number:
                os.rename(claim, path)
                if _content(path) == content:
                    return Lease(path, file, content)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(claim)
        except FileNotFoundError:  # who has a higher number has removed the claim
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)
    return None


def _claims(path: Path) -> list[int]:
    """Return the numbers of those who are taking the run, or have ended while they did."""
    prefix = f"{path.name}."
    tails = [name.removeprefix(prefix) for name in os.listdir(path.parent) if name.startswith(prefix)]
    return [int(tail) for tail in tails if tail.isascii() and tail.isdecimal()]


def _content(path: Path) -> bytes | None:
    # Opened, because a client of a file server may answer stat from its cache for a minute.
    try:
        file = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return os.pread(file, 1 << 16, 0)
    finally:
        os.close(file)


def _read(path: Path) -> dict[str, Any]:
    return _parse(_content(path))


def _parse(content: bytes | None) -> dict[str, Any]:
    with contextlib.suppress(ValueError, TypeError):
        return dict(json.loads(content or b""))
    return {}


def _encode(record: Mapping[str, Any]) -> bytes:
    # First and of a fixed width, so that a sign of life is one small write in place.
    values = {key: value for key, value in record.items() if key != "beat"}
    return json.dumps({"beat": f"{0:0{_BEAT_WIDTH}d}", **values}).encode() + b"\n"


def _machine() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _end_cut_off(path: Path) -> None:
    with contextlib.suppress(OSError):
        print(
            f"{path.parent}: nothing was heard of this launch for a while, and another one has taken the run over; "
            "this one ends here",
            file=sys.stderr,
            flush=True,
        )
    os._exit(EXIT_NO_RESTART)


def _in_use(path: Path, content: bytes | None) -> str:
    owner = _parse(content)
    who = (
        f"process {owner['pid']} on {owner.get('host')}, since {owner.get('time')}" if "pid" in owner else "just begun"
    )
    return f"{path.parent} is in use by another launch ({who})"
