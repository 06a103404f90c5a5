"""Who has a run where flock says yes to everybody: many launches, interleaved at every call of the system, on a simulated clock."""

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bigtrain.errors import ConfigError
from bigtrain.supervise import lease
from bigtrain.supervise.lease import BEAT_SECONDS, LEASE_SECONDS, take_lease

CALLS = ("open", "rename", "unlink", "pread", "pwrite", "listdir")


class CutOffError(Exception):
    """In the place of the end of a process."""


class World:
    """Launches as threads of which one runs at a time; a seed decides which, and time passes only when all wait."""

    def __init__(self, seed: int, *, calm: bool) -> None:
        self.random = random.Random(seed)
        self.calm = calm
        self.now = 0.0
        self.wake: dict[str, float] = {}
        self.suspended: set[str] = set()
        self.holding: dict[str, float] = {}
        """Since when."""
        self.overlap = self.longest_overlap = 0.0
        self.history: list[tuple[float, str, str]] = []
        self._turns: dict[str, threading.Semaphore] = {}
        self._back = threading.Semaphore(0)
        self._ended: set[str] = set()

    @property
    def me(self) -> str:
        return threading.current_thread().name

    def add(self, name: str, begin: float, body: Callable[[], None]) -> None:
        def work() -> None:
            self._turns[name].acquire()
            try:
                body()
            finally:
                self._ended.add(name)
                self.holding.pop(name, None)
                self._back.release()

        self._turns[name], self.wake[name] = threading.Semaphore(0), begin
        threading.Thread(target=work, name=name, daemon=True).start()

    def sleep(self, seconds: float) -> None:
        """Let the others go on; sometimes this launch stands still before that, as a machine that is cut off."""
        me = self.me
        if not self.calm and self.random.random() < (0.02 if seconds < BEAT_SECONDS else 0.15):
            self.suspended.add(me)
            self._yield(self.random.uniform(0, 3 * LEASE_SECONDS))
            self.suspended.discard(me)
        self._yield(seconds)

    def _yield(self, seconds: float) -> None:
        self.wake[self.me] = self.now + seconds
        turn = self._turns[self.me]
        self._back.release()
        turn.acquire()

    def run(self) -> None:
        while waiting := [name for name in self._turns if name not in self._ended]:
            next_time = max(self.now, min(self.wake[name] for name in waiting))
            acting = [name for name in self.holding if name not in self.suspended and name not in self._ended]
            self.overlap = self.overlap + next_time - self.now if len(acting) > 1 else 0.0
            self.longest_overlap = max(self.longest_overlap, self.overlap)
            self.now = next_time
            name = self.random.choice([name for name in waiting if self.wake[name] <= self.now])
            self._turns[name].release()
            assert self._back.acquire(timeout=30), f"{name} does not come back"


def interleave(path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, *, calm: bool) -> World:
    """Run launches of one run at times and with ends that the seed decides."""
    world = World(seed, calm=calm)

    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            world.sleep(world.random.choice((0.0, 0.0, 0.001, 0.01)))
            return function(*args)

        return call

    names = {name: getattr(os, name) for name in dir(os)}
    system = SimpleNamespace(**names | {name: slow(names[name]) for name in CALLS})
    clock = SimpleNamespace(sleep=world.sleep, time=lambda: 1e9 * hash(world.me), strftime=lambda _: "now")

    def end(path: Path) -> None:
        raise CutOffError(path)

    with monkeypatch.context() as patch:
        patch.setattr(lease, "os", system)
        patch.setattr(lease, "time", clock)
        patch.setattr(lease, "try_lock", lambda *_: True)
        patch.setattr(lease, "_machine", lambda: world.me)
        patch.setattr(lease, "_end_cut_off", end)
        for number in range(5):
            begin = world.random.choice((0.0, world.random.uniform(0, 100)))
            world.add(f"launch {number}", begin, lambda: train(world, path))
        world.run()
    return world


def train(world: World, path: Path) -> None:
    """Take the run, give signs of life, and end: in order, by a crash, or because somebody has taken over."""
    try:
        held = take_lease(path, patient=world.random.random() < 0.8)
    except ConfigError:
        world.history.append((world.now, world.me, "refused"))
        return
    world.holding[world.me] = world.now
    world.history.append((world.now, world.me, "has it"))
    end = world.now + world.random.uniform(5, 60)
    try:
        while world.now < end:
            world.sleep(BEAT_SECONDS)
            held.give_sign(lambda: None)
    except CutOffError:
        world.history.append((world.now, world.me, "cut off"))
        return
    del world.holding[world.me]
    if world.random.random() < 0.5:
        held.release()


def test_a_flock_that_excludes_nobody_gives_a_run_to_one_launch_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kinds, longest = [], 0.0
    for seed in range(100):
        path = tmp_path / str(seed) / "attempt.json"
        path.parent.mkdir()
        world = interleave(path, seed, monkeypatch, calm=seed % 2 == 0)
        bound = 0.0 if world.calm else BEAT_SECONDS + 1.0  # until it looks, and its look
        assert world.longest_overlap <= bound, (seed, world.history)
        kinds += [kind for _, _, kind in world.history]
        longest = max(longest, world.longest_overlap)
        assert [name for name in os.listdir(path.parent) if name != path.name] == [] or not world.calm
    assert min(kinds.count(kind) for kind in ("has it", "refused", "cut off")) > 4
    assert longest > 0.0, "launches that are cut off do meet others"


def write_over(path: Path, judged: bytes | None, number: int) -> lease.Lease:
    """Take a run as one would without a thought of others: the last one has it."""
    new = path.with_name(f"new-{number}-{threading.current_thread().name}")
    content = lease._encode({"hold": number, "id": str(new)})
    new.write_bytes(content)
    lease.os.rename(new, path)
    return lease.Lease(path, os.open(path, os.O_RDWR), content)


@pytest.mark.parametrize(
    ("part", "fault"), [("_is_free", lambda content, lock, newest: True), ("_seize", write_over)], ids=["free", "over"]
)
def test_that_test_can_fail(part: str, fault: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, part, fault)
    found = []
    for seed in range(0, 40, 2):
        path = tmp_path / str(seed) / "attempt.json"
        path.parent.mkdir()
        found.append(interleave(path, seed, monkeypatch, calm=True).longest_overlap)
    assert max(found) > 0
