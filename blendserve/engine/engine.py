"""The engine: schedule, run, postprocess, until every request of a source has its completion."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from blendserve.engine.completion_maker import CompletionMaker
from blendserve.engine.detokenizer import Detokenizer
from blendserve.engine.device import (
    block_bytes,
    count_blocks,
    describe_device,
    free_memory_bytes,
    is_out_of_memory,
    resolve_device,
    resolve_dtype,
)
from blendserve.engine.kv_cache import KVCache
from blendserve.engine.memory_profile import profile_activation_bytes
from blendserve.engine.model_runner import LaunchedStep, ModelRunner
from blendserve.engine.overlap import OverlapPolicy, overlap_policy
from blendserve.engine.request import Completion, Request
from blendserve.engine.running import RunningRequests
from blendserve.engine.sampler import Sampler
from blendserve.engine.scheduled_batch import ScheduledBatch
from blendserve.engine.scheduler import Scheduler
from blendserve.engine.step_metrics import StepMetrics
from blendserve.engine.upcoming import RequestSource
from blendserve.engine_limits import resolve_limits
from blendserve.errors import UsageError
from blendserve.models.config import ModelConfig
from blendserve.models.llama import LlamaModel
from blendserve.models.weights import dummy_weights, load_weights
from blendserve.spec import EngineSpec, SamplingSpec

log = logging.getLogger(__name__)

# What is left of the KV cache when a step finds no memory, and how often that is tried.
_SHRUNK_SHARE = 0.9
_MAX_SHRINKS = 5

# What follows a source: None as long as nothing is known of it, else what opens it. That is given the requests that
# still run, and gives None where nothing is left in it to run.
NextSource = Callable[[], Callable[[Sequence[Request]], RequestSource | None] | None]


@dataclass(frozen=True, slots=True)
class _StepInFlight:
    """A launched step, and its metrics but for the times."""

    batch: ScheduledBatch
    counts: dict[str, int]
    launched: LaunchedStep


class LLMEngine:
    """A loaded model that turns requests into completions, from one source at a time. The prefix cache outlives it."""

    def __init__(
        self,
        model_folder: Path,
        spec: EngineSpec,
        sampling: SamplingSpec,
        *,
        max_useful_tokens: int | None = None,
        max_requests: int = 0,
        max_in_flight: int | None = None,
        overlap: OverlapPolicy | None = None,
    ) -> None:
        """max_useful_tokens, max_requests: what one source will hold at most, so that no more memory is taken than it
        can fill.

        max_in_flight: steps that may be launched before the first one's tokens are back, 1 or 2. A GPU gets 2, so that
        it never waits for the host; on a CPU there is nothing to hide.

        overlap: when decodes and prefill chunks run side by side; by `spec` without it.

        Raises ModelError when the model can't be loaded, UsageError when the device or its memory can't do.
        """
        self.config = config = ModelConfig.load(model_folder)
        device = resolve_device(spec)
        dtype = resolve_dtype(spec, device)
        self.device_name = describe_device(device)
        self.max_model_len = min(spec.max_model_len or config.max_position_embeddings, config.max_position_embeddings)
        self.limits = limits = resolve_limits(spec, is_gpu=device.type == "cuda")
        eos_token_ids = () if sampling.ignore_eos else config.eos_token_ids
        self._completions = CompletionMaker(Detokenizer(model_folder, sampling.stop), eos_token_ids)
        if spec.overlap == "on" and device.type == "cuda" and not limits.is_batch_invariant:
            overlap = overlap or overlap_policy(self.device_name, config)
        model = self._load_model(model_folder, spec, dtype, device)
        bytes_per_block = block_bytes(config, limits.block_size, dtype)
        num_blocks = spec.num_blocks or self._size_cache(model, bytes_per_block, max_useful_tokens, max_requests)
        self.kv_bytes_per_token = bytes_per_block // limits.block_size
        self._kv_cache = KVCache(num_blocks, limits.block_size, limits.has_prefix_cache)
        self.runner = ModelRunner(
            model,
            Sampler(sampling, device),
            num_blocks=num_blocks,
            block_size=limits.block_size,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            is_batch_invariant=limits.is_batch_invariant,
            overlap=overlap,
        )
        self._paced_tokens = overlap.paced_tokens if overlap else None
        self._max_in_flight = max_in_flight or (2 if device.type == "cuda" else 1)
        self._num_steps = self._num_shrinks = 0
        self._started = self._ended = 0.0
        self.busy_seconds = 0.0  # of the last run, on a GPU
        self.waiting_seconds = 0.0  # of the last run: the host's, for steps to end

    @property
    def num_blocks(self) -> int:
        """KV cache blocks."""
        return self._kv_cache.num_blocks

    def warm_up(self) -> int:
        """Prepare for every shape of step, which otherwise happens as they come. Returns how many were captured."""
        return self.runner.warm_up()

    def clear_prefix_cache(self) -> None:
        """Forget the prompts of earlier runs."""
        self._kv_cache = KVCache(self._kv_cache.num_blocks, self._kv_cache.block_size, self.limits.has_prefix_cache)

    def run(
        self,
        source: RequestSource,
        *,
        on_finished: Callable[[Completion], None],
        on_step: Callable[[StepMetrics], None],
        should_stop: Callable[[], bool],
        next_source: NextSource | None = None,
    ) -> None:
        """Run all requests of `source`, or until `should_stop()`, which is asked before each step.

        Each request comes out of `on_finished` once; one that can't run comes out with an error. When all of them are
        admitted, `next_source` may say what to go on with beside those that still run.
        """
        self._scheduler = self._make_scheduler(source, is_last=next_source is None)
        self._num_steps = self._num_shrinks = 0
        self._started = self._ended = time.perf_counter()
        self.busy_seconds = self.waiting_seconds = 0.0
        in_flight: deque[_StepInFlight] = deque()
        while (self._scheduler.has_unfinished or in_flight) and not should_stop():
            if next_source and self._has_begun_all and (open_source := next_source()):
                for completion in self._finish_all(in_flight, on_step):
                    on_finished(completion)
                self._follow(open_source)
            batch = self._scheduler.schedule()
            completions = [Completion.failed(request, reason) for request, reason in batch.failed]
            step = self._launch(batch)
            if step is None:
                completions += self._finish_all(in_flight, on_step)
                self._shrink_cache()
            elif batch.num_tokens or not in_flight:
                in_flight.append(step)
            if in_flight and (len(in_flight) >= self._max_in_flight or not batch.num_tokens):
                completions += self._finish(in_flight.popleft(), on_step)
            for completion in completions:
                on_finished(completion)
        for step in in_flight:
            self.runner.collect(step.launched)
        self._scheduler.abort()
        self._completions.clear()
        self._kv_cache.check_integrity(())

    def _make_scheduler(
        self, source: RequestSource, running: RunningRequests | None = None, *, is_last: bool = False
    ) -> Scheduler:
        return Scheduler(
            source,
            self._kv_cache,
            max_num_seqs=self.limits.max_num_seqs,
            max_num_batched_tokens=self.limits.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            paced_tokens=self._paced_tokens,
            weights_tokens=self.config.layer_parameters // self.config.kv_elements_per_token,
            running=running,
            is_last=is_last,
        )

    @property
    def _has_begun_all(self) -> bool:
        """Whether nothing waits and every prompt is computed: all that is left is to decode."""
        running = self._scheduler.running
        return self._scheduler.num_waiting == 0 and bool(running.is_decoding[running.active_rows()].all())

    def _follow(self, open_source: Callable[[Sequence[Request]], RequestSource | None]) -> None:
        """Go on with another source, if there is something in it, beside what still runs. No step is in flight."""
        running = self._scheduler.running
        source = open_source([request for request in running.requests if request is not None])
        if source is not None:
            self._scheduler = self._make_scheduler(source, running)
            self._num_shrinks = 0

    def _launch(self, batch: ScheduledBatch) -> _StepInFlight | None:
        """Start a step; None when there is no memory for it."""
        counts = self._describe(batch)
        try:
            return _StepInFlight(batch, counts, self.runner.launch(batch))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.warning("A step of %d tokens found no memory: %s", batch.num_tokens, error)
            return None

    def _shrink_cache(self) -> None:
        """Give a tenth of the KV cache up for what steps need, and begin all running requests again.

        Raises UsageError when that has been done too often.
        """
        self._num_shrinks += 1
        num_blocks = int(self._kv_cache.num_blocks * _SHRUNK_SHARE)
        if self._num_shrinks > _MAX_SHRINKS or num_blocks < 2:
            raise UsageError(
                f"Out of memory on {self.device_name} with a KV cache of {self._kv_cache.num_blocks} blocks, after "
                f"{self._num_shrinks - 1} reductions. Lower max_num_batched_tokens "
                f"({self.limits.max_num_batched_tokens}) or num_blocks, or see what else uses the device."
            )
        log.warning("The KV cache shrinks from %d to %d blocks", self._kv_cache.num_blocks, num_blocks)
        self._kv_cache = KVCache(num_blocks, self.limits.block_size, self.limits.has_prefix_cache)
        self._scheduler.begin_again(self._kv_cache)
        self.runner.resize_cache(num_blocks)

    def _finish_all(self, in_flight: deque[_StepInFlight], on_step: Callable[[StepMetrics], None]) -> list[Completion]:
        completions = []
        while in_flight:
            completions += self._finish(in_flight.popleft(), on_step)
        return completions

    def _finish(self, step: _StepInFlight, on_step: Callable[[StepMetrics], None]) -> list[Completion]:
        """Wait for a step. Returns the completions that end with it."""
        asked = time.perf_counter()
        output = self.runner.collect(step.launched)
        self.waiting_seconds += time.perf_counter() - asked
        self.busy_seconds += output.busy_seconds
        began, self._ended = self._ended, time.perf_counter()
        completions = self._completions.take_tokens(self._scheduler, step.batch, output)
        started, seconds = began - self._started, self._ended - began
        on_step(StepMetrics(self._num_steps, started_seconds=started, step_seconds=seconds, **step.counts))
        self._num_steps += 1
        return completions

    def _describe(self, batch: ScheduledBatch) -> dict[str, int]:
        """The step's metrics but for its times; taken before the step's requests finish."""
        running = self._scheduler.running
        rows = np.flatnonzero(running.serials)
        return {
            "num_prefill_tokens": batch.num_prefill_tokens,
            "num_decode_tokens": len(batch.decode_rows),
            "num_running": len(rows),
            "num_running_left": int(np.count_nonzero(~running.is_right(rows))),
            "num_waiting": self._scheduler.num_waiting,
            "num_used_blocks": self._kv_cache.num_used_blocks,
            "num_total_blocks": self._kv_cache.num_blocks,
            "num_cached_tokens": batch.num_cached_tokens,
            "num_preempted": batch.num_preempted,
            "kv_read_bytes": int((batch.decode_positions + 1).sum()) * self.kv_bytes_per_token,
        }

    def _load_model(self, folder: Path, spec: EngineSpec, dtype: torch.dtype, device: torch.device) -> LlamaModel:
        is_invariant = self.limits.is_batch_invariant
        if spec.load_format == "dummy":
            weights = dummy_weights(self.config, dtype, device, is_batch_invariant=is_invariant)
        else:
            weights = load_weights(folder, self.config, dtype, device, is_batch_invariant=is_invariant)
        return LlamaModel(self.config, weights, self.max_model_len)

    def _size_cache(
        self, model: LlamaModel, bytes_per_block: int, max_useful_tokens: int | None, max_requests: int
    ) -> int:
        limits = self.limits
        num_tokens = min(limits.max_num_batched_tokens, self.max_model_len * limits.max_num_seqs)
        activation_bytes = profile_activation_bytes(
            model,
            num_tokens=num_tokens,
            num_sampled=min(limits.max_num_seqs, num_tokens),
            max_model_len=self.max_model_len,
            block_size=limits.block_size,
        )
        available = free_memory_bytes(model.device, activation_bytes)
        useful = self.max_model_len * limits.max_num_seqs if max_useful_tokens is None else max_useful_tokens
        useful_blocks = -(-useful // limits.block_size) + max_requests  # each rounds its last block up
        return count_blocks(available, bytes_per_block, max(useful_blocks, 2))
