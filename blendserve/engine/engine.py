"""The engine: schedule, run, postprocess, until every request of a source has its completion."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from blendserve.dual_scanner import Front
from blendserve.engine.detokenizer import Detokenizer, GrowingText
from blendserve.engine.device import (
    block_bytes,
    count_blocks,
    describe_device,
    free_memory_bytes,
    resolve_device,
    resolve_dtype,
)
from blendserve.engine.kv_cache import KVCache
from blendserve.engine.memory_profile import profile_activation_bytes
from blendserve.engine.model_runner import ModelRunner, StepOutput
from blendserve.engine.request import Completion, FinishReason, Request
from blendserve.engine.sampler import Sampler
from blendserve.engine.scheduler import RequestSource, ScheduledBatch, Scheduler
from blendserve.engine.step_metrics import StepMetrics
from blendserve.models.config import ModelConfig
from blendserve.models.llama import LlamaModel
from blendserve.models.weights import dummy_weights, load_weights
from blendserve.spec import EngineSpec, SamplingSpec


class LLMEngine:
    """A loaded model that turns requests into completions. One source at a time; the prefix cache outlives it."""

    def __init__(
        self, model_folder: Path, spec: EngineSpec, sampling: SamplingSpec, *, max_useful_tokens: int | None = None
    ) -> None:
        """max_useful_tokens: KV cache that the work can fill at most, so that no more memory is taken.

        Raises ModelError when the model can't be loaded, UsageError when the device or its memory can't do.
        """
        config = ModelConfig.load(model_folder)
        device = resolve_device(spec)
        dtype = resolve_dtype(spec, device)
        self.device_name = describe_device(device)
        self.max_model_len = min(spec.max_model_len or config.max_position_embeddings, config.max_position_embeddings)
        self._spec = spec
        self._detokenizer = Detokenizer(model_folder, sampling.stop)
        self._eos_token_ids = frozenset(() if sampling.ignore_eos else config.eos_token_ids)
        is_dummy = spec.load_format == "dummy"
        weights = (
            dummy_weights(config, dtype, device) if is_dummy else load_weights(model_folder, config, dtype, device)
        )
        model = LlamaModel(config, weights, self.max_model_len)
        bytes_per_block = block_bytes(config, spec.block_size, dtype)
        num_blocks = spec.num_blocks or self._size_cache(model, bytes_per_block, max_useful_tokens)
        self._kv_bytes_per_token = bytes_per_block // spec.block_size
        self._kv_cache = KVCache(num_blocks, spec.block_size, spec.prefix_cache)
        self._runner = ModelRunner(
            model,
            Sampler(sampling, device),
            num_blocks=num_blocks,
            block_size=spec.block_size,
            max_num_seqs=spec.max_num_seqs,
            max_model_len=self.max_model_len,
        )
        self._texts: dict[int, GrowingText] = {}  # by position, where stop strings have to be looked for
        self._num_steps = 0
        self._started = 0.0

    def run(
        self,
        source: RequestSource,
        *,
        on_finished: Callable[[Completion], None],
        on_step: Callable[[StepMetrics], None],
        should_stop: Callable[[], bool],
    ) -> None:
        """Run all requests of `source`, or until `should_stop()`, which is asked before each step.

        Each request comes out of `on_finished` once; one that can't run comes out with an error.
        """
        self._scheduler = Scheduler(
            source,
            self._kv_cache,
            max_num_seqs=self._spec.max_num_seqs,
            max_num_batched_tokens=self._spec.max_num_batched_tokens,
            max_model_len=self.max_model_len,
        )
        self._num_steps, self._started = 0, time.perf_counter()
        while self._scheduler.has_unfinished and not should_stop():
            completions, metrics = self.step()
            for completion in completions:
                on_finished(completion)
            on_step(metrics)
        self._scheduler.abort()
        self._texts.clear()
        self._kv_cache.check_integrity(())

    def step(self) -> tuple[list[Completion], StepMetrics]:
        """One step: the requests that it finished, and what it did."""
        started = time.perf_counter()
        batch = self._scheduler.schedule()
        metrics = self._describe(batch)
        output = self._runner.run(batch) if batch.num_tokens else StepOutput([], [])
        completions = self._postprocess(batch, output)
        self._num_steps += 1
        return completions, metrics(started - self._started, time.perf_counter() - started)

    def _postprocess(self, batch: ScheduledBatch, output: StepOutput) -> list[Completion]:
        """Take the new tokens into their requests; returns those that are finished with them."""
        sampled = batch.sampled
        for request in batch.decodes:
            request.num_computed_tokens += 1
        for chunk in batch.prefills:
            chunk.request.num_computed_tokens += chunk.num_tokens
        completions = [_failure(request, reason) for request, reason in batch.failed]
        for request, token_id, is_valid in zip(sampled, output.token_ids, output.is_valid, strict=True):
            completion = self._take_token(request, token_id) if is_valid else self._not_finite(request)
            if completion is not None:
                self._scheduler.finish(request, is_reusable=is_valid)
                self._texts.pop(request.position, None)
                completions.append(completion)
        return completions

    def _take_token(self, request: Request, token_id: int) -> Completion | None:
        """Append a token; the completion if the request ends with it."""
        token_ids = request.output_token_ids
        token_ids.append(token_id)
        if token_id in self._eos_token_ids:
            return self._completion(request, FinishReason.STOP, self._detokenizer.decode(token_ids[:-1]))
        if self._detokenizer.has_stop_strings:
            growing = self._texts.setdefault(request.position, GrowingText(self._detokenizer))
            text = growing.append(token_ids)
            if text is not None:
                return self._completion(request, FinishReason.STOP, text)
        if len(token_ids) >= request.max_tokens:
            return self._completion(request, FinishReason.LENGTH, self._detokenizer.decode(token_ids))
        return None

    def _completion(self, request: Request, reason: FinishReason, text: str) -> Completion:
        return Completion(
            row_index=request.row_index,
            request_id=request.request_id,
            text=text,
            token_ids=tuple(request.output_token_ids),
            finish_reason=reason,
            error=None,
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached_tokens,
        )

    def _not_finite(self, request: Request) -> Completion:
        return _failure(
            request,
            f"the model gave logits that are not finite for token {len(request.output_token_ids)} of the completion. "
            "Try --dtype float32, and check the model's weights",
        )

    def _describe(self, batch: ScheduledBatch) -> Callable[[float, float], StepMetrics]:
        """The step's metrics but for its times; taken before the step's requests finish."""
        running = self._scheduler.running
        counts = {
            "step": self._num_steps,
            "num_prefill_tokens": batch.num_prefill_tokens,
            "num_decode_tokens": len(batch.decodes),
            "num_running": len(running),
            "num_running_left": sum(request.current_front is Front.LEFT for request in running),
            "num_waiting": self._scheduler.num_waiting,
            "num_used_blocks": self._kv_cache.num_used_blocks,
            "num_total_blocks": self._kv_cache.num_blocks,
            "num_cached_tokens": batch.num_cached_tokens,
            "num_preempted": batch.num_preempted,
            "kv_read_bytes": sum(request.num_tokens for request in batch.decodes) * self._kv_bytes_per_token,
        }
        return lambda started, seconds: StepMetrics(started_seconds=started, step_seconds=seconds, **counts)

    def _size_cache(self, model: LlamaModel, bytes_per_block: int, max_useful_tokens: int | None) -> int:
        spec = self._spec
        num_tokens = min(spec.max_num_batched_tokens, self.max_model_len)
        activation_bytes = profile_activation_bytes(
            model,
            num_tokens=num_tokens,
            num_sampled=min(spec.max_num_seqs, num_tokens),
            block_size=spec.block_size,
        )
        available = free_memory_bytes(model.device, activation_bytes)
        useful = self.max_model_len * spec.max_num_seqs if max_useful_tokens is None else max_useful_tokens
        return count_blocks(available, bytes_per_block, max(-(-useful // spec.block_size), 2))


def _failure(request: Request, reason: str) -> Completion:
    """An error completion. Tokens generated before the error are not given out: they would look like an answer."""
    return Completion(
        row_index=request.row_index,
        request_id=request.request_id,
        text=None,
        token_ids=(),
        finish_reason=FinishReason.ERROR,
        error=reason,
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=request.num_cached_tokens,
    )
