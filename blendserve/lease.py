"""A lease on a folder: one process at a time works in it, and one that was believed dead can't publish any more.

`leases/00001.json`, `leases/00002.json`, …: whoever creates the next number holds the folder. The number is the fencing
token, and the name of an attempt is the number and a random part. The holder rewrites its claim every few seconds; one
that stays as it is for LEASE_SECONDS by the clock of whoever looks on has expired, so clocks need not agree. A claim
lists the files that its holder took over. Those and the ones that carry its attempt's name count, nothing else: a
process that was paused through its lease and wakes up may still write a file, which then belongs to nobody.

Invariants: a number is created once; what counts changes in one step, when a claim's list is written or the next number
closes the folder.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import psutil

from blendserve.errors import BlendServeError, InUseError
from blendserve.file_store import FileStore

LEASE_SECONDS = float(os.environ.get("BLENDSERVE_LEASE_SECONDS", "60"))
_BEATS_A_LEASE = 6
_POLL_SECONDS = 0.1
_FOLDER = "leases/"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Claim:
    """The content of one claim. `machine` and `pid` are where its holder runs, `started` when that process began: in
    clock ticks since the machine's start, which no setting of the clock moves; where there is no /proc, as psutil says.

    `files` is None until its holder has said what it takes over; until then nothing that it wrote counts.
    """

    token: int
    attempt: str
    machine: str
    pid: int
    started: float
    beat: int = 0
    is_released: bool = False
    is_done: bool = False
    files: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        return claim_name(self.token)

    def encoded(self) -> bytes:
        return (json.dumps(asdict(self)) + "\n").encode()


def claim_name(token: int) -> str:
    return f"{_FOLDER}{token:05d}.json"


def counted_files(store: FileStore, prefix: str) -> list[str]:
    """The files that count, of those whose names start with `prefix`; all of them where nobody ever claimed the folder.

    While the folder is in use it gives what counts at this moment.
    """
    names = store.names(prefix)
    claim = _newest_written(store)
    return names if claim is None else _counted(claim, names)


def _counted(claim: Claim, names: Sequence[str]) -> list[str]:
    taken_over = set(claim.files or ())
    return [name for name in names if name in taken_over or (not claim.is_done and f"-{claim.attempt}-" in name)]


def _newest_written(store: FileStore, before: str | None = None) -> Claim | None:
    for name in reversed(store.names(_FOLDER)):
        claim = _decoded(store.read(name)) if before is None or name < before else None
        if claim is not None and claim.files is not None:
            return claim
    return None


def _decoded(content: bytes | None) -> Claim | None:
    """None for a claim of which nothing or not all is written yet. What other versions add to claims is left out."""
    try:
        values = json.loads(content or b"")
    except ValueError:
        return None
    known = {field.name: values[field.name] for field in fields(Claim) if field.name in values}
    return Claim(**known | {"files": None if values["files"] is None else tuple(values["files"])})


class Lease:
    """A held lease. State what is taken over first; ask `check` before anything appears in the folder."""

    def __init__(self, store: FileStore, claim: Claim, what: str) -> None:
        self._store = store
        self._what = what
        self._claim = claim
        self._lock = threading.Lock()  # the claim is rewritten by two threads
        self._ended = threading.Event()
        self._is_lost = False
        self._thread = threading.Thread(target=self._keep_alive, daemon=True, name="lease")
        self._thread.start()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_error: object) -> None:
        """Let the next one in at once."""
        self._ended.set()
        self._thread.join()
        if self._claim.is_done or self._is_lost:
            return
        try:
            self.check()
            self._rewrite(is_released=True)
        except (BlendServeError, OSError) as error:
            log.warning("The lease on %s ends by itself: %s", self._what, error)

    @property
    def attempt(self) -> str:
        """Part of the name of every file that this attempt writes."""
        return self._claim.attempt

    @property
    def is_lost(self) -> bool:
        """Whether somebody else was seen to have taken over."""
        return self._is_lost

    def check(self) -> None:
        """Raises InUseError when somebody else has taken over, or the folder was given to another job."""
        own = _decoded(self._store.read(self._claim.name))
        is_newest = self._store.read(claim_name(self._claim.token + 1)) is None
        if not is_newest or own is None or own.attempt != self._claim.attempt:
            self._is_lost = True
            raise self._lost()

    def inherited(self, prefix: str) -> list[str]:
        """The files that counted when this lease began, of those whose names start with `prefix`."""
        names = self._store.names(prefix)
        earlier = _newest_written(self._store, before=self._claim.name)
        return names if earlier is None else _counted(earlier, names)

    def counted(self, names: Sequence[str]) -> list[str]:
        return _counted(self._claim, names)

    def take_over(self, files: Sequence[str]) -> None:
        """From now on these files count and the attempt's own, those that it has written already too."""
        self.check()
        self._rewrite(files=tuple(files))

    def close(self, files: Sequence[str]) -> None:
        """End the lease for good: these files count and no others. One caller only gets through here.

        Raises InUseError when somebody else has taken over.
        """
        self.check()
        done = replace(self._claim, token=self._claim.token + 1, is_done=True, files=tuple(files))
        if not self._store.create(done.name, done.encoded()):
            self._is_lost = True
            raise self._lost()
        self._claim = done
        self._ended.set()

    def _keep_alive(self) -> None:
        while not self._ended.wait(LEASE_SECONDS / _BEATS_A_LEASE):
            try:
                self.check()
                self._rewrite(beat=self._claim.beat + 1)
            except InUseError:
                return
            except (BlendServeError, OSError) as error:
                # The holder may go on: should the claim expire, `check` keeps it from publishing.
                log.warning("The lease on %s can't be renewed: %s", self._what, error)

    def _rewrite(self, **changes: object) -> None:
        with self._lock:
            self._claim = replace(self._claim, **changes)  # type: ignore[arg-type]
            self._store.write(self._claim.name, self._claim.encoded())

    def _lost(self) -> InUseError:
        return InUseError(
            f"{self._what} was taken over by another process, because this one had been silent for longer than its "
            f"lease of {LEASE_SECONDS:g} s. What it wrote since doesn't count; the other one goes on."
        )


def acquire_lease(store: FileStore, what: str, *, wait_seconds: float | None = 0.0) -> Lease:
    """Take the lease on the folder `store`, which messages call `what`; leave it as a context manager.

    An expired, released or dead holder is taken over from. A living one is waited for, at least `wait_seconds` and
    until it was seen to live; with None nobody is. Raises InUseError when it stays.
    """
    return Lease(store, _claimed(store, what, wait_seconds), what)


def _claimed(store: FileStore, what: str, wait_seconds: float | None) -> Claim:
    """Create the next claim as soon as the newest one is free."""
    started = time.monotonic()
    watched = _Watched(None, started)
    while True:
        names = store.names(_FOLDER)
        newest = names[-1] if names else None
        content = store.read(newest) if newest else None
        now = time.monotonic()
        watched = watched.seen((newest, content), now)
        if newest is None or _is_free(_decoded(content)) or now - watched.since >= LEASE_SECONDS:
            claim = _own_claim(int(Path(newest).stem) + 1 if newest else 1)
            if store.create(claim.name, claim.encoded()):
                return claim
            continue
        holder = _decoded(content)
        is_alive = watched.num_changes > 0 or (wait_seconds == 0 and holder is not None and _runs_here(holder))
        if wait_seconds is None or (is_alive and now - started >= wait_seconds):
            raise InUseError(
                f"{what} is in use by {_describe(holder)}. Wait for it or stop it; a holder that died is taken over "
                f"from after {LEASE_SECONDS:g} s."
            )
        time.sleep(_POLL_SECONDS)


@dataclass(frozen=True, slots=True)
class _Watched:
    """Since when the newest claim is as it is, and how often it was seen to change."""

    state: object
    since: float
    num_changes: int = -1

    def seen(self, state: object, now: float) -> _Watched:
        return self if state == self.state else _Watched(state, now, self.num_changes + 1)


def _own_claim(token: int) -> Claim:
    started = _started(psutil.Process())
    return Claim(token, f"{token:05d}-{uuid.uuid4().hex[:8]}", _machine(), os.getpid(), started)


def _is_free(claim: Claim | None) -> bool:
    if claim is None:
        return False  # just created: its holder is about to write it
    return claim.is_released or claim.is_done or (claim.machine == _machine() and not _runs_here(claim))


def _runs_here(claim: Claim) -> bool:
    """Whether the holder is a process of this machine that lives; never for one of another machine or container."""
    if claim.machine != _machine():
        return False
    try:
        process = psutil.Process(claim.pid)
        is_same = abs(_started(process) - claim.started) < 1
        return bool(is_same and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return False


def _started(process: psutil.Process) -> float:
    if not Path("/proc/self/stat").is_file():
        return float(process.create_time())
    stat = Path(f"/proc/{process.pid}/stat").read_text()
    return float(stat.rpartition(")")[2].split()[19])  # its field 22; the name, in brackets, may hold spaces


def _machine() -> str:
    """This boot of this machine, and the container in which process numbers mean something."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    numbers = Path("/proc/self/ns/pid")
    parts = [platform.node(), boot.read_text().strip() if boot.is_file() else ""]
    return " ".join([*parts, str(numbers.readlink()) if numbers.is_symlink() else ""])


def _describe(holder: Claim | None) -> str:
    return f"process {holder.pid} on {holder.machine.split()[0]}" if holder else "a process that is just starting"
