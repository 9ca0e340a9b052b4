"""Runs one shard in a process of its own, so that its GPU memory ends with it, and watches over that process."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from blendserve.errors import EngineOutOfMemoryError, EngineProcessError, Interrupted, InUseError, PlanError
from blendserve.file_store import open_store
from blendserve.manifest import PlanManifest, ShardManifest, read_manifest

_POLL_SECONDS = 0.2
_STOP_SECONDS = 20.0
_KEPT_LINES = 30
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
    device: str | None = None,
) -> ShardManifest:
    """Run a shard of the plan in `plan_folder` to its end and return its manifest.

    Finished rows of an earlier attempt are kept and not run again. `should_stop` is asked five times a second; when
    it says yes, or when this thread is interrupted, the engine writes out what is finished and ends.
    `completions` is the folder or URL that the completions' folders lie in; by default what the plan says.
    `device` is the one GPU that the process shall see, as CUDA_VISIBLE_DEVICES names it; by default all of them.

    Raises Interrupted when stopped, InUseError when another process has the shard, PlanError for an unknown shard or
    bad plan, EngineOutOfMemoryError or else EngineProcessError.
    """
    plan = read_manifest(plan_folder / "plan.json", PlanManifest)
    place = completions or str((plan_folder / plan.completions).resolve())
    # The engine ends with us, however we end: the pipe to its stdin closes.
    command = [sys.executable, "-m", "blendserve.engine.run_shard", "--stop-at-eof", "--completions", place]
    command += [str(plan_folder), str(shard)]
    with subprocess.Popen(  # noqa: S603 - our own module, no shell
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_environment(device)
    ) as process:
        lines: deque[str] = deque(maxlen=_KEPT_LINES)
        try:
            status = _watch(process, lines, on_progress, should_stop)
        except BaseException:
            _stop(process)
            raise
    if status == 0:
        content = open_store(f"{place}/shard-{shard:05d}").read("shard.json")
        return ShardManifest.model_validate_json(content or b"")
    detail = "\n".join(lines) or "it wrote nothing"
    if status in (Interrupted.exit_status, -2, -15):
        raise Interrupted(f"Shard {shard} was stopped. What is finished is kept; run again to go on.")
    if status == InUseError.exit_status:
        raise InUseError(detail.splitlines()[-1])
    if status == PlanError.exit_status:
        raise PlanError(f"Shard {shard} can't run: {detail}")
    if status == -signal.SIGKILL or any(mark in detail for mark in _MEMORY_MARKS):
        raise EngineOutOfMemoryError(
            f"Shard {shard} of {plan_folder} ran out of memory, or was killed (status {status}). Finished rows are "
            "kept; run again to go on, with fewer KV cache blocks or running requests if it comes again. "
            f"Its last lines:\n{detail}"
        )
    raise EngineProcessError(
        f"Shard {shard} of {plan_folder} ended with status {status}. Finished rows are kept; run again to go on. "
        f"Its last lines:\n{detail}"
    )


def _environment(device: str | None) -> dict[str, str]:
    # Threads that spin while they wait for each other slow a loaded machine down; it must be set before torch loads.
    defaults = {"OMP_WAIT_POLICY": "PASSIVE"}
    chosen = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
    return {**defaults, **os.environ, **chosen, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def _watch(
    process: subprocess.Popen[bytes],
    lines: deque[str],
    on_progress: Callable[[Progress], None] | None,
    should_stop: Callable[[], bool] | None,
) -> int:
    written: queue.Queue[bytes] = queue.Queue()
    reader = threading.Thread(target=_forward, args=(process.stderr, written), daemon=True)
    reader.start()
    is_stopping = False
    while process.poll() is None or reader.is_alive() or not written.empty():
        if should_stop is not None and not is_stopping and should_stop():
            process.terminate()
            is_stopping = True
        try:
            line = written.get(timeout=_POLL_SECONDS).decode("utf-8", errors="replace").rstrip()
        except queue.Empty:
            continue
        progress = _parse_progress(line)
        if progress is None:
            lines.append(line)
            log.info("%s", line)
        elif on_progress is not None:
            on_progress(progress)
    return process.wait()


def _forward(stream: IO[bytes] | None, written: queue.Queue[bytes]) -> None:
    for line in stream or ():
        written.put(line)


def _parse_progress(line: str) -> Progress | None:
    if not line.startswith("{"):
        return None
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if message.get("event") == "progress" else None


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
