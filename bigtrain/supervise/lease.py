"""The lease of a launch on its run: a heartbeat in a file, a lock where there are locks, and the take-over.

A lock alone is not enough: it may be local to a node or without effect (Lustre ``localflock``, NFS ``local_lock``), and
a node that is cut off keeps it while Slurm has queued the job again elsewhere. So the holder increments a number in the
file every 3 s. A taken lock proves a live holder; a free one proves something only on the holder's own machine.
Otherwise a newcomer watches the number, by its own clock, and takes over when it has not changed for 30 s.

A take-over creates ``<file>.<n>`` with n above all others (O_EXCL), removes lower ones, checks that nothing has
changed, and renames it to the file, which fails if a higher n has removed it. A holder that was cut off checks before
each beat that the file is still its own, and ends: two launches overlap for at most one beat.
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
LEASE_SECONDS = 30.0  # without a beat for so long, a holder is cut off
PATIENCE_SECONDS = 600.0  # for a live holder, whose watchdog may need three times the longest phase
_LOOK_SECONDS = 1.0
_BEAT_OFFSET, _BEAT_WIDTH = len('{"beat": "'), 12
_RELEASED = "released"


class Lease:
    """The open lease file of a run that this launch holds, until the process ends at the latest."""

    def __init__(self, path: Path, file: int, content: bytes) -> None:
        self._path, self._file = path, file
        self._record = _parse(content)
        self._num_beats = 0
        self._released = threading.Event()
        self._lock = threading.Lock()  # the descriptor of a closed file may be reused
        self._directory = os.open(path.parent, os.O_RDONLY)  # follows a rename

    def write(self, values: Mapping[str, Any]) -> None:
        self._record = {**self._record, **values}
        content = _encode(self._record)
        os.pwrite(self._file, content, 0)
        os.ftruncate(self._file, len(content))

    def keep(self, on_move: Callable[[], None] = lambda: None) -> None:
        """Beat from now on; call ``on_move`` when the directory moves, and end if another launch took over."""
        threading.Thread(target=self._beat, args=(on_move,), daemon=True).start()

    def release(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._released.set()
            self._sign(_RELEASED)
            os.close(self._file)
            os.close(self._directory)

    def is_here(self) -> bool:
        return _read(self._path).get("id") == self._record["id"]

    def has_moved(self) -> bool:
        if self.is_here():
            return False
        try:
            return not os.path.samestat(os.fstat(self._directory), os.stat(self._path.parent))
        except FileNotFoundError:
            return True

    def follow(self) -> Path:
        """Return where the run's directory is now; a removed one is made anew as ``<name>-rescued``."""
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
        if not self.is_here():
            if self.has_moved():
                on_move()
            elif not self._path.exists():  # removed by hand, which is no take-over
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
        except OSError:  # a full disk, where the file system copies on write
            os.utime(self._file)

    def _put_back(self) -> None:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        os.close(self._file)
        self._file = file
        try_lock(file, self._path)
        self.write({})


def take_lease(path: Path, *, patient: bool, hurry: bool = False) -> Lease:
    """Take the run of a lease file, silent holders (``patient``: live ones) waited for; ConfigError: one is live."""
    sign: tuple[Any, ...] | None = None
    waited, silent, is_heard = 0.0, 0.0, False
    while True:
        content, lock, touched = _look(path)
        newest = max([int(_parse(content).get("hold", 0)), *_claims(path)])
        before, sign = sign, (content, touched, newest)
        # Only successful reads count: while the file server is away, nothing is known of the holder.
        silent = silent + _LOOK_SECONDS if sign == before else 0.0
        is_heard = is_heard or before not in (None, sign)
        is_cut_off = silent >= LEASE_SECONDS
        if is_cut_off or _is_free(content, lock, newest):
            if is_cut_off:
                get_logger().warning(f"{_in_use(path, content)} gives no sign of life any more: taken over")
            if lease := _seize(path, content, newest + 1):
                return lease
            continue
        # Another machine's clock decides only whether a taken lock is waited for: a look takes it for a moment.
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
    """Return the content of the file, the state of its lock, and the time of the last write.

    The lock is ``taken`` by a live process, ``ours`` where it excludes others on this machine, or ``free``, which
    proves nothing.
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
    """Return whether the run certainly has no holder, nor a launch that is taking it."""
    record = _parse(content)
    if newest > int(record.get("hold", 0)):
        return False
    return (
        content is None or _is_released(record) or (lock == "ours" and record.get("machine", _machine()) == _machine())
    )


def _is_released(record: Mapping[str, Any]) -> bool:
    return str(record.get("beat", "")).strip() == _RELEASED


def _seize(path: Path, judged: bytes | None, number: int) -> Lease | None:
    """Take the run if its file is as ``judged``; None if another launch takes it too."""
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
        except FileNotFoundError:  # removed by a higher number
            pass
        except BaseException:
            os.close(file)
            raise
        os.close(file)
    return None


def _claims(path: Path) -> list[int]:
    """Return the numbers of take-overs that are under way or were cut short."""
    prefix = f"{path.name}."
    tails = [name.removeprefix(prefix) for name in os.listdir(path.parent) if name.startswith(prefix)]
    return [int(tail) for tail in tails if tail.isascii() and tail.isdecimal()]


def _content(path: Path) -> bytes | None:
    # Opened, because an NFS client may answer stat from its cache for a minute.
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read(path: Path) -> dict[str, Any]:
    return _parse(_content(path))


def _parse(content: bytes | None) -> dict[str, Any]:
    with contextlib.suppress(ValueError, TypeError):
        return dict(json.loads(content or b""))
    return {}


def _encode(record: Mapping[str, Any]) -> bytes:
    # The beat is first and of fixed width: one small write in place.
    values = {key: value for key, value in record.items() if key != "beat"}
    return json.dumps({"beat": f"{0:0{_BEAT_WIDTH}d}", **values}).encode() + b"\n"


def _machine() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _end_cut_off(path: Path) -> None:
    with contextlib.suppress(OSError):
        why = "nothing was heard of this launch for a while, and another one has taken the run over; this one ends here"
        print(f"{path.parent}: {why}", file=sys.stderr, flush=True)
    os._exit(EXIT_NO_RESTART)


def _in_use(path: Path, content: bytes | None) -> str:
    owner = _parse(content)
    who = (
        f"process {owner['pid']} on {owner.get('host')}, since {owner.get('time')}" if "pid" in owner else "just begun"
    )
    return f"{path.parent} is in use by another launch ({who})"
