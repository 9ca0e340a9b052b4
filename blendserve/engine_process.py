"""Runs shards in a process of their own, so that its GPU memory ends with it, and watches over that process.

The process says in JSON lines how far it is ("progress"), which shard is through ("done") and when it can take another
("next"), which is before the last requests of a shard are through. Its failure is that of the shards that it was given
and that aren't done.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from blendserve.errors import (
    BlendServeError,
    EngineOutOfMemoryError,
    EngineProcessError,
    Interrupted,
    InUseError,
    PlanError,
    StoreUnreachableError,
)
from blendserve.manifest import PlanManifest, ShardManifest, read_manifest

_POLL_SECONDS = 0.2
_STOP_SECONDS = 20.0
_REST_SECONDS = 5.0  # for what an ended process wrote last
_KEPT_LINES = 30
_EVENTS = ("progress", "next", "done")
_MEMORY_MARKS = ("OutOfMemoryError", "MemoryError", "out of memory", "can't allocate memory")

log = logging.getLogger(__name__)

Progress = dict[str, Any]


def find_plan(folder: Path) -> Path:
    """The folder of `plan.json`: `folder` itself, or the `plan` folder of the job that `folder` is the output of."""
    for candidate in (folder, folder / "plan"):
        if (candidate / "plan.json").is_file():
            return candidate.absolute()
    raise PlanError(f"{folder} holds no plan: plan.json is not there. Make one with `blendserve plan`.")


def run_shard_process(
    plan_folder: Path,
    shard: int,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    completions: str | None = None,
) -> ShardManifest:
    """Run a shard of the plan in `plan_folder` to its end and return its manifest.

    Finished rows of an earlier attempt are kept and not run again. `should_stop` is asked five times a second; when
    it says yes, or when this thread is interrupted, the engine writes out what is finished and ends; one that hasn't
    ended after 20 seconds is killed.
    `completions` is the folder or URL that the completions' folders lie in; by default what the plan says.

    Raises Interrupted when stopped, InUseError when another process has the shard, StoreUnreachableError when an
    object store doesn't answer, PlanError for an unknown shard or bad plan, EngineOutOfMemoryError or else
    EngineProcessError.
    """
    done: list[ShardManifest] = []
    engine = _EngineProcess(plan_folder, on_done=done.append, on_progress=on_progress)
    engine.run([str(shard)], should_stop=should_stop, completions=completions, running=[shard])
    return done[0]


def run_shards_process(
    plan_folder: Path,
    next_shard: Callable[[], int | None],
    on_done: Callable[[ShardManifest], None],
    *,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    device: str | None = None,
) -> None:
    """Run shards one after the other in one process, which loads the model once.

    `next_shard` is asked whenever the process can take another one, until it has None. `device` is the one GPU that the
    process shall see, as CUDA_VISIBLE_DEVICES names it; by default all of them. All else is as for `run_shard_process`.
    """
    engine = _EngineProcess(plan_folder, on_done=on_done, on_progress=on_progress, next_shard=next_shard)
    engine.run([], should_stop=should_stop, device=device)


class _EngineProcess:
    """An engine's process, the shards that it has been given, and what it says of them."""

    def __init__(
        self,
        plan_folder: Path,
        *,
        on_done: Callable[[ShardManifest], None],
        on_progress: Callable[[Progress], None] | None,
        next_shard: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._plan_folder = plan_folder
        self._on_done = on_done
        self._on_progress = on_progress
        self._next_shard = next_shard
        self._running: list[int] = []  # given to the process and not done
        self._has_more = True
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)

    def run(
        self,
        arguments: Sequence[str],
        *,
        should_stop: Callable[[], bool] | None,
        completions: str | None = None,
        device: str | None = None,
        running: Sequence[int] = (),
    ) -> None:
        """Start the process and watch it to its end. `running`: the shards that its `arguments` name."""
        plan = read_manifest(self._plan_folder / "plan.json", PlanManifest)
        place = completions or str((self._plan_folder / plan.completions).resolve())
        # The engine ends with us, however we end: the pipe to its stdin closes.
        command = [sys.executable, "-m", "blendserve.engine.run_shard", "--stop-at-eof", "--completions", place]
        command += [str(self._plan_folder), *arguments]
        self._running = list(running)
        with subprocess.Popen(  # noqa: S603 - our own module, no shell
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_environment(device)
        ) as process:
            try:
                status = self._watch(process, should_stop)
            except BaseException:
                _stop(process)
                raise
        if status != 0 or self._running:
            raise self._failure(status)

    def _watch(self, process: subprocess.Popen[bytes], should_stop: Callable[[], bool] | None) -> int:
        """Hear what the process says to its end. Returns its status; SIGTERM's when it had to be killed to stop."""
        written: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=_forward, args=(process.stderr, written), daemon=True)
        reader.start()
        process.stderr = None  # the thread's alone: to close it would wait for a child of the process that has it too
        kill_at, is_killed = math.inf, False
        while process.poll() is None:
            if time.monotonic() >= kill_at and not is_killed:
                log.warning("The engine's process didn't stop within %g s and is killed.", _STOP_SECONDS)
                process.kill()
                is_killed = True
            elif kill_at == math.inf and should_stop is not None and should_stop():
                process.terminate()
                kill_at = time.monotonic() + _STOP_SECONDS
            with suppress(queue.Empty):
                self._hear(written.get(timeout=_POLL_SECONDS), process)
        reader.join(_REST_SECONDS)
        while not written.empty():
            self._hear(written.get(), process)
        status = process.wait()
        return -signal.SIGTERM if is_killed and status == -signal.SIGKILL else status

    def _hear(self, line: str, process: subprocess.Popen[bytes]) -> None:
        """Take in a line that the process has written."""
        message = _parse_event(line)
        if message is None:
            self._lines.append(line)
            log.info("%s", line)
        elif message["event"] == "next":
            self._give_next(process)
        elif message["event"] == "done":
            manifest = ShardManifest.model_validate(message["manifest"])
            self._running.remove(manifest.shard)
            self._lines.clear()  # what was said of it explains no failure of another
            self._on_done(manifest)
            self._close_when_through(process)
        elif self._on_progress is not None:
            self._on_progress(message)

    def _give_next(self, process: subprocess.Popen[bytes]) -> None:
        shard = self._next_shard()
        if shard is None:
            self._has_more = False
            self._close_when_through(process)
            return
        self._running.append(shard)
        if process.stdin is not None:
            with suppress(BrokenPipeError):  # it has ended, which its status explains
                os.write(process.stdin.fileno(), f"{shard}\n".encode())

    def _close_when_through(self, process: subprocess.Popen[bytes]) -> None:
        """Not earlier: a process whose stdin ends while it runs a shard stops."""
        if not self._has_more and not self._running and process.stdin is not None:
            process.stdin.close()

    def _failure(self, status: int) -> BlendServeError:
        """What a process's end means that didn't finish its shards."""
        shards = " and ".join(f"shard {shard}" for shard in self._running) or "the engine's process"
        what = shards[0].upper() + shards[1:]
        where = f"{what} of {self._plan_folder}"
        detail = "\n".join(self._lines) or "it wrote nothing"
        if status in (Interrupted.exit_status, -signal.SIGINT, -signal.SIGTERM):
            return Interrupted(f"{what} was stopped. What is finished is kept; run again to go on.")
        if status == InUseError.exit_status:
            return InUseError(detail.splitlines()[-1])
        if status == StoreUnreachableError.exit_status:
            return StoreUnreachableError(detail.splitlines()[-1])
        if status == PlanError.exit_status:
            return PlanError(f"{what} can't run: {detail}")
        if status == -signal.SIGKILL or any(mark in detail for mark in _MEMORY_MARKS):
            return EngineOutOfMemoryError(
                f"{where} ran out of memory, or was killed (status {status}). Finished rows are kept; run again to go "
                f"on, with fewer KV cache blocks or running requests if it comes again. Its last lines:\n{detail}"
            )
        return EngineProcessError(
            f"{where} ended with status {status}. Finished rows are kept; run again to go on. Its last lines:\n{detail}"
        )


def _environment(device: str | None) -> dict[str, str]:
    # Threads that spin while they wait for each other slow a loaded machine down; it must be set before torch loads.
    defaults = {"OMP_WAIT_POLICY": "PASSIVE"}
    chosen = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
    return {**defaults, **os.environ, **chosen, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def _forward(stream: IO[bytes], written: queue.Queue[str]) -> None:
    with stream:
        for line in stream:
            written.put(line.decode("utf-8", errors="replace").rstrip())


def _parse_event(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if message.get("event") in _EVENTS else None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the engine to stop; it writes out what is finished within seconds. Kill it only when it doesn't."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
