"""Which GPUs there are, and shards that run side by side on them."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from blendserve.engine_process import Progress, run_shards_process
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
    """Run shards of one plan in `gpus` processes, each on a GPU of its own; yields their manifests as they are done.

    A process takes the next shard when it is through with one. When one fails, or the caller goes away, the others are
    stopped; they keep what they have finished.
    """
    visible = visible_gpus() if gpus > 1 else []
    waiting, lock, stop = iter(shards), threading.Lock(), threading.Event()
    ended: queue.SimpleQueue[ShardManifest | Future[None]] = queue.SimpleQueue()  # shards, and processes

    def next_shard() -> int | None:
        with lock:
            return next(waiting, None)

    num_processes = min(gpus, len(shards))
    with ThreadPoolExecutor(max(num_processes, 1)) as pool:
        for number in range(num_processes):
            process = pool.submit(
                run_shards_process,
                plan_folder,
                next_shard,
                ended.put,
                on_progress=on_progress,
                should_stop=stop.is_set,
                device=visible[number] if visible else None,
            )
            process.add_done_callback(ended.put)
        try:
            while num_processes:
                done = ended.get()
                if isinstance(done, ShardManifest):
                    yield done
                else:
                    done.result()
                    num_processes -= 1
        finally:
            stop.set()
