"""Which GPUs there are, and shards that run side by side on them."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from blendserve.engine_process import Progress, run_shard_process
from blendserve.errors import UsageError
from blendserve.manifest import ShardManifest
from blendserve.nvidia_smi import query_gpus


def visible_gpus() -> list[str]:
    """The GPUs that a process started now would see, as CUDA_VISIBLE_DEVICES names them."""
    stated = os.environ.get("CUDA_VISIBLE_DEVICES")
    if stated is not None:
        return [name.strip() for name in stated.split(",") if name.strip() not in ("", "-1")]
    return query_gpus("index")


def check_gpus(gpus: int) -> None:
    """Raise UsageError when there are GPUs, but fewer than `gpus`. Where there is none the CPU does what it can."""
    visible = visible_gpus()
    if visible and gpus > len(visible):
        raise UsageError(f"Option 'gpus': {gpus} were asked for, {len(visible)} can be seen here. Ask for as many.")


def run_shards(
    plan_folder: Path,
    shards: Sequence[int],
    *,
    gpus: int,
    on_progress: Callable[[Progress], None] | None = None,
) -> Iterator[ShardManifest]:
    """Run shards of one plan, `gpus` at a time, each on a GPU of its own; yields their manifests as they are done.

    When one fails, or the caller goes away, the others are stopped; they keep what they have finished.
    """
    visible = visible_gpus() if gpus > 1 else []
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for number in range(gpus):
        free.put(visible[number] if visible else None)
    stop = threading.Event()

    def run(shard: int) -> ShardManifest:
        device = free.get()
        try:
            return run_shard_process(
                plan_folder, shard, on_progress=on_progress, should_stop=stop.is_set, device=device
            )
        finally:
            free.put(device)

    with ThreadPoolExecutor(gpus) as pool:
        futures = [pool.submit(run, shard) for shard in shards]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
