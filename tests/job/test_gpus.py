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
from blendserve.manifest import ShardManifest

SLOW = 0  # a shard that takes longer than all others


class FakeEngine:
    """Stands in for the engines' processes; remembers who ran where, and beside how many."""

    def __init__(self, failing: int | None = None) -> None:
        self.failing = failing
        self.devices: dict[int, str | None] = {}
        self.stopped: list[int] = []
        self.num_processes = self.most_at_once = 0
        self._running: set[str | None] = set()
        self._lock = threading.Lock()

    def __call__(
        self,
        _plan: Path,
        next_shard: Callable[[], int | None],
        on_done: Callable[[ShardManifest], None],
        *,
        on_progress: Any,
        should_stop: Callable[[], bool],
        device: str | None,
    ) -> None:
        with self._lock:
            assert device not in self._running or device is None
            self._running.add(device)
            self.num_processes += 1
            self.most_at_once = max(self.most_at_once, len(self._running))
        try:
            while (shard := next_shard()) is not None:
                self.devices[shard] = device
                self._run(shard, should_stop)
                on_done(ShardManifest.model_construct(shard=shard))
        finally:
            with self._lock:
                self._running.discard(device)

    def _run(self, shard: int, should_stop: Callable[[], bool]) -> None:
        if shard == self.failing:
            raise EngineProcessError("no")
        for _ in range(200 if self.failing is not None else 3):
            if should_stop():
                self.stopped.append(shard)
                raise Interrupted("stopped")
            time.sleep(0.1 if shard == SLOW else 0.01)


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeEngine], FakeEngine]:
    def replace(engine: FakeEngine) -> FakeEngine:
        monkeypatch.setattr(gpus, "run_shards_process", engine)
        return engine

    return replace


def numbers(tmp_path: Path, num_shards: int, num_gpus: int) -> list[int]:
    return [done.shard for done in gpus.run_shards(tmp_path, range(num_shards), gpus=num_gpus)]


def test_each_process_has_a_gpu_of_its_own(
    replaced: Callable[[FakeEngine], FakeEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = replaced(FakeEngine())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6,7")
    assert sorted(numbers(tmp_path, 7, 2)) == list(range(7)) == sorted(engine.devices)
    assert set(engine.devices.values()) == {"4", "6"}
    assert engine.most_at_once == engine.num_processes == 2


def test_a_process_that_is_through_takes_the_next_shard(
    replaced: Callable[[FakeEngine], FakeEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = replaced(FakeEngine())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert numbers(tmp_path, 5, 2)[-1] == SLOW, "the other one ran all that came after it"
    assert [shard for shard, device in engine.devices.items() if device == engine.devices[SLOW]] == [SLOW]


def test_no_more_processes_than_shards(
    replaced: Callable[[FakeEngine], FakeEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = replaced(FakeEngine())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert numbers(tmp_path, 0, 4) == [] and engine.num_processes == 0
    assert sorted(numbers(tmp_path, 2, 4)) == [0, 1] and engine.num_processes == 2


def test_one_gpu_is_left_to_the_process(replaced: Callable[[FakeEngine], FakeEngine], tmp_path: Path) -> None:
    engine = replaced(FakeEngine())
    assert numbers(tmp_path, 3, 1) == [0, 1, 2]
    assert set(engine.devices.values()) == {None} and engine.num_processes == 1


def test_a_failed_shard_stops_the_others(
    replaced: Callable[[FakeEngine], FakeEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = replaced(FakeEngine(failing=1))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(EngineProcessError):
        numbers(tmp_path, 6, 2)
    assert engine.stopped == [0] and set(engine.devices) <= {0, 1, 2}


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
