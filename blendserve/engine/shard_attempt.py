"""One attempt at a shard: its requests through the engine, its completions into its folder, and how far it is."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import torch

import blendserve
from blendserve.engine.batch_density import BatchDensity
from blendserve.engine.detokenizer import Detokenizer
from blendserve.engine.device import describe_device, resolve_device
from blendserve.engine.engine import LLMEngine
from blendserve.engine.request import Completion, FinishReason
from blendserve.engine.shard_folder import CompletionWriter, ShardFolder
from blendserve.engine.shard_reader import ShardReader
from blendserve.engine.step_metrics import StepMetrics, ended_seconds
from blendserve.errors import Interrupted, ReconciliationError
from blendserve.manifest import PlanManifest, ShardManifest, ShardPlan

_PROGRESS_SECONDS = 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a shard is. `done`: requests, those of earlier attempts too; tokens: prompt and output.

    `density`: compute seconds over memory seconds of the requests that run, by the plan; None while none does.
    """

    shard: int
    done: int
    total: int
    num_running: int
    tokens_per_second: float
    seconds: float
    density: float | None


class ShardAttempt:
    """One attempt at a shard, whose folder is locked and taken over."""

    def __init__(
        self,
        plan_dir: Path,
        plan: PlanManifest,
        shard_plan: ShardPlan,
        folder: ShardFolder,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self._plan = plan
        self._shard_plan = shard_plan
        self._folder = folder
        self._on_progress = on_progress
        self._reader = ShardReader(
            plan_dir / shard_plan.file,
            seed=plan.sampling.seed,
            is_two_ended=plan.is_two_ended,
            done_rows=folder.read_counts().column("row_index").to_pylist(),
        )
        self._num_requests = len(self._reader.row_indices)
        self._num_resumed = self._num_requests - self._reader.num_requests
        self._num_done = self._num_resumed
        self._num_tokens = 0
        self._density = BatchDensity(self._reader)
        self._reported_at = 0.0
        self._last_step: StepMetrics | None = None

    def run(self, loaded_engine: Callable[[], LLMEngine], should_stop: Callable[[], bool]) -> ShardManifest:
        """Run what is left and publish the shard. The engine is asked for only where something is left.

        Raises Interrupted when `should_stop()` said so before the end.
        """
        device = describe_device(resolve_device(self._plan.engine))
        log.info(
            "Shard %d: %d requests, %d of them finished earlier, on %s",
            *(self._shard_plan.shard, self._num_requests, self._num_resumed, device),
        )
        if self._reader.num_requests:
            self._run_engine(loaded_engine(), should_stop)
        if self._num_done < self._num_requests:
            raise Interrupted(
                f"Shard {self._shard_plan.shard} was asked to stop with {self._num_done} of {self._num_requests} "
                "requests finished. They are written; run the shard again to go on."
            )
        manifest = self._manifest(device, self._folder.write_metrics())
        self._folder.publish(manifest)
        return manifest

    def _run_engine(self, engine: LLMEngine, should_stop: Callable[[], bool]) -> None:
        plan, writer = self._plan, CompletionWriter(self._folder)
        texts = Detokenizer(Path(plan.model), ()) if plan.engine.log_texts else None

        def on_step(metrics: StepMetrics) -> None:
            self._num_tokens += metrics.num_prefill_tokens + metrics.num_cached_tokens + metrics.num_decode_tokens
            writer.add_step(metrics)
            self._last_step = metrics
            self._report(metrics)

        def on_finished(completion: Completion) -> None:
            writer.add(completion)
            if texts is not None:
                _log_texts(completion, texts)
            self._num_done += 1
            self._reader.finish(completion)
            self._density.finish(completion.row_index)
            if self._num_done == self._num_requests and self._last_step is not None:
                self._report(self._last_step)

        def must_stop() -> bool:
            return self._folder.is_lost or should_stop()

        try:
            engine.run(self._reader, on_finished=on_finished, on_step=on_step, should_stop=must_stop)
        finally:
            writer.flush()

    def _report(self, metrics: StepMetrics) -> None:
        """Tell the progress, at most once a second and once at the end."""
        now = time.monotonic()
        is_last = self._num_done == self._num_requests
        if self._on_progress is None or (now - self._reported_at < _PROGRESS_SECONDS and not is_last):
            return
        self._reported_at = now
        seconds = metrics.started_seconds + metrics.step_seconds
        self._on_progress(
            Progress(
                shard=self._shard_plan.shard,
                done=self._num_done,
                total=self._num_requests,
                num_running=metrics.num_running,
                tokens_per_second=round(self._num_tokens / seconds, 1) if seconds > 0 else 0.0,
                seconds=round(seconds, 3),
                density=self._density.value(),
            )
        )

    def _manifest(self, device: str, metrics: pa.Table) -> ShardManifest:
        counts = self._folder.read_counts()
        counts = counts.filter(pc.is_in(counts.column("row_index"), pa.array(self._reader.row_indices)))
        num_rows = pc.count_distinct(counts.column("row_index")).as_py()
        if counts.num_rows != self._num_requests or num_rows != self._num_requests:
            raise ReconciliationError(
                f"{self._folder.place} holds {counts.num_rows} completions of {num_rows} requests, expected one for "
                f"each of {self._num_requests}. Remove the folder and run the shard again."
            )

        def total(column: str, table: pa.Table = counts) -> int:
            return int(pc.sum(table.column(column)).as_py() or 0)

        num_failed = int(pc.sum(pc.equal(counts.column("finish_reason"), FinishReason.ERROR.value)).as_py() or 0)
        return ShardManifest(
            plan_id=self._plan.plan_id,
            shard=self._shard_plan.shard,
            status="done",
            num_requests=self._num_requests,
            num_succeeded=self._num_requests - num_failed,
            num_failed=num_failed,
            num_resumed=self._num_resumed,
            num_prompt_tokens=total("num_prompt_tokens"),
            num_cached_tokens=total("num_cached_tokens"),
            num_completion_tokens=total("num_completion_tokens"),
            num_preemptions=total("num_preempted", metrics),
            num_steps=metrics.num_rows,
            seconds=ended_seconds(metrics),
            device=device,
            versions=_versions(),
        )


def _log_texts(completion: Completion, detokenizer: Detokenizer) -> None:
    prompt = [] if completion.prompt_token_ids is None else completion.prompt_token_ids.tolist()
    texts = {
        "request_id": completion.request_id,
        "prompt": detokenizer.decode(prompt),
        "completion": completion.text,
    }
    log.info("%s", json.dumps({"event": "completion", **texts}, ensure_ascii=False))


def _versions() -> dict[str, str]:
    return {
        "blendserve": blendserve.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyarrow": pa.__version__,
    }
