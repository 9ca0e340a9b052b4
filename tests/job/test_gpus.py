"""Shards side by side: each has a GPU of its own, and when one fails the others are stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from blendserve import gpus
from blendserve.errors import EngineProcessError, Interrupted, UsageError


class FakeEngine:
    """Stands in for the shard processes; remembers who ran where, and beside how many."""

    def __init__(self, failing: int | None = None) -> None:
        self.failing = failing
        self.devices: dict[int, str | None] = {}
        self.stopped: list[int] = []
        self.most_at_once = 0
        self._running: set[str | None] = set()
        self._lock = threading.Lock()

    def __call__(
        self, _plan: Path, shard: int, *, on_progress: Any, should_stop: Callable[[], bool], device: str | None
    ) -> int:
        with self._lock:
            assert device not in self._running or device is None
            self._running.add(device)
            self.devices[shard] = device
            self.most_at_once = max(self.most_at_once, len(self._running))
        try:
            return self._run(shard, should_stop)
        finally:
            with self._lock:
                self._running.discard(device)

    def _run(self, shard: int, should_stop: Callable[[], bool]) -> int:
        if shard == self.failing:
            raise EngineProcessError("no")
        for _ in range(200 if self.failing is not None else 3):
            if should_stop():
                self.stopped.append(shard)
                raise Interrupted("stopped")
            time.sleep(0.01)
        return shard


def test_each_shard_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(gpus, "run_shard_process", engine)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6,7")
    done: list[Any] = list(gpus.run_shards(tmp_path, range(7), gpus=2))
    assert sorted(done) == list(range(7)) == sorted(engine.devices)
    assert set(engine.devices.values()) == {"4", "6"}
    assert engine.most_at_once == 2


def test_one_gpu_is_left_to_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = FakeEngine()
    monkeypatch.setattr(gpus, "run_shard_process", engine)
    assert len(list(gpus.run_shards(tmp_path, range(3), gpus=1))) == 3
    assert set(engine.devices.values()) == {None}


def test_a_failed_shard_stops_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = FakeEngine(failing=1)
    monkeypatch.setattr(gpus, "run_shard_process", engine)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(EngineProcessError):
        list(gpus.run_shards(tmp_path, range(6), gpus=2))
    assert engine.stopped == [0]
    assert set(engine.devices) <= {0, 1, 2}


@pytest.mark.parametrize(("visible", "expected"), [("", []), ("-1", []), ("0,3", ["0", "3"]), ("GPU-ab", ["GPU-ab"])])
def test_gpus_are_those_that_a_process_would_see(
    monkeypatch: pytest.MonkeyPatch, visible: str, expected: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus.visible_gpus() == expected


def test_more_gpus_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    gpus.check_gpus(2)
    with pytest.raises(UsageError, match="'gpus': 3 were asked for, 2 can be seen"):
        gpus.check_gpus(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpus.check_gpus(3)  # the CPU does what it can
