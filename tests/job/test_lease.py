"""Leases: one holder at a time, and what a holder writes after it was taken over from counts for nobody."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from blendserve import lease
from blendserve.errors import InUseError
from blendserve.file_store import LocalStore
from blendserve.lease import Lease, acquire_lease, counted_files

ELSEWHERE = {"machine": "gpu-worker-7 boot pid:[1]", "pid": 1, "started": 0.0}


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "shard")


@pytest.fixture(autouse=True)
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.3)


@pytest.fixture
def no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lease, "_keep_alive", lambda _self: None)


def acquire(store: LocalStore, wait_seconds: float = 0.1) -> Lease:
    """The lease, with all that counted taken over."""
    held = acquire_lease(store, "Shard 0", wait_seconds=wait_seconds)
    held.take_over(held.inherited("part-"))
    return held


def write_part(store: LocalStore, holder: Lease, number: int) -> str:
    name = f"part-{holder.attempt}-{number:05d}.parquet"
    store.write(name, b"rows")
    return name


def on_another_machine(store: LocalStore) -> None:
    """Make the newest claim one of a process that nobody here can look at."""
    name = store.names("leases/")[-1]
    claim = json.loads((store.root / name).read_bytes())
    store.write(name, json.dumps(claim | ELSEWHERE).encode())


def test_a_released_lease_is_free_at_once(store: LocalStore) -> None:
    with acquire(store) as first:
        part = write_part(store, first, 0)
    started = time.monotonic()
    with acquire(store) as second:
        own = write_part(store, second, 0)
        assert counted_files(store, "part-") == sorted([part, own])
    assert second.attempt[:5] == "00002" and time.monotonic() - started < 0.3


def test_a_living_holder_is_not_taken_over_from(store: LocalStore) -> None:
    with acquire(store) as first:
        on_another_machine(store)
        with pytest.raises(InUseError, match="Shard 0 is in use by process"):
            acquire(store, wait_seconds=0.5)
        first.check()


def test_who_does_not_want_to_wait_is_told_at_once(store: LocalStore, no_heartbeat: None) -> None:
    with acquire(store), pytest.raises(InUseError):
        acquire(store, wait_seconds=0)


def test_who_waits_for_nothing_leaves_a_silent_holder_alone(store: LocalStore, no_heartbeat: None) -> None:
    with acquire(store):
        on_another_machine(store)
        with pytest.raises(InUseError):
            acquire_lease(store, "Shard 0", wait_seconds=None)
    with acquire_lease(store, "Shard 0", wait_seconds=None):
        pass


def test_setting_the_clock_takes_no_lease_away(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, no_heartbeat: None
) -> None:
    """When a process began is told by the clock, unless it is told in ticks since the machine's start."""
    real = psutil.Process.create_time
    with acquire(store):
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: real(process) + 2)
        with pytest.raises(InUseError):
            acquire(store, wait_seconds=0)


def test_a_claim_of_a_later_version_can_be_read(store: LocalStore, no_heartbeat: None) -> None:
    with acquire(store):
        claim = json.loads(store.read("leases/00001.json") or b"")
        store.write("leases/00001.json", json.dumps(claim | {"color": "blue"}).encode())
        with pytest.raises(InUseError):
            acquire(store, wait_seconds=0)


def test_a_silent_holder_of_another_machine_is_taken_over_from(store: LocalStore, no_heartbeat: None) -> None:
    first = acquire(store)
    kept = write_part(store, first, 0)
    on_another_machine(store)
    second = acquire(store)
    late = write_part(store, first, 1)
    assert counted_files(store, "part-") == [kept], "what comes after the second one began counts for nobody"
    assert late in store.names("part-")
    for publish in (first.check, lambda: first.close([kept, late]), lambda: first.take_over([])):
        with pytest.raises(InUseError, match="was taken over by another process"):
            publish()
    second.close([kept])
    assert counted_files(store, "part-") == [kept]


def test_what_counts_changes_in_one_step(store: LocalStore, no_heartbeat: None) -> None:
    """A holder writes a part anew without its failed rows, and may die before it says so."""
    with acquire(store) as first:
        old = write_part(store, first, 0)
    second = acquire_lease(store, "Shard 0")
    new = write_part(store, second, 0)
    assert counted_files(store, "part-") == [old]
    second.take_over([])
    assert counted_files(store, "part-") == [new]


def test_what_a_holder_wrote_before_it_took_over_counts_for_nobody_after_its_death(
    store: LocalStore, no_heartbeat: None
) -> None:
    with acquire(store) as first:
        old = write_part(store, first, 0)
    with acquire_lease(store, "Shard 0") as second:
        write_part(store, second, 0)
    with acquire(store):
        assert counted_files(store, "part-") == [old]


def test_one_only_of_two_holders_gets_to_close(store: LocalStore, no_heartbeat: None) -> None:
    first = acquire(store)
    store.create("leases/00002.json", b"")  # somebody takes over right after the first one's check
    with pytest.raises(InUseError):
        first.close([])


def test_a_killed_process_of_this_machine_is_taken_over_from_at_once(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 600.0)
    script = (
        "import os, pathlib, sys; from blendserve.file_store import LocalStore; from blendserve.lease import *\n"
        "acquire_lease(LocalStore(pathlib.Path(sys.argv[1])), 'Shard 0'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script, str(store.root)], check=False)
    assert store.names("leases/") == ["leases/00001.json"]
    with acquire(store) as second:
        assert second.attempt[:5] == "00002"


@pytest.mark.parametrize("content", [b"", b'{"token": 1, "at'])
def test_a_claim_cut_off_by_a_crash_expires(store: LocalStore, content: bytes, no_heartbeat: None) -> None:
    with acquire(store) as first:
        part = write_part(store, first, 0)
    store.create("leases/00002.json", content)
    assert counted_files(store, "part-") == [part]
    with acquire(store) as third:
        assert third.attempt[:5] == "00003"
        assert counted_files(store, "part-") == [part]


def test_a_folder_given_to_another_job_is_lost(store: LocalStore, no_heartbeat: None) -> None:
    first = acquire(store)
    store.remove("leases/00001.json")  # the job was started over
    with acquire(store) as other:
        write_part(store, first, 0)
        assert other.attempt[:5] == first.attempt[:5] == "00001"
        assert counted_files(store, "part-") == []
        with pytest.raises(InUseError):
            first.check()


def test_parts_of_a_folder_that_nobody_claimed_count(store: LocalStore) -> None:
    store.write("part-00000.parquet", b"rows")
    assert counted_files(store, "part-") == ["part-00000.parquet"]
    with acquire(store):
        assert counted_files(store, "part-") == ["part-00000.parquet"]


def test_many_at_once_take_turns(store: LocalStore) -> None:
    num_in, most = 0, 0

    def work() -> None:
        nonlocal num_in, most
        with acquire(store, wait_seconds=30):
            num_in += 1
            most = max(most, num_in)
            time.sleep(0.02)
            num_in -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert len(store.names("leases/")) == 6


@pytest.fixture
def read_only(store: LocalStore) -> Iterator[None]:
    store.root.mkdir()
    (store.root / "leases").write_text("a file where the folder should be")
    yield


def test_a_folder_that_can_not_be_written_is_an_error(store: LocalStore, read_only: None) -> None:
    with pytest.raises(OSError, match="leases"):
        acquire(store)
