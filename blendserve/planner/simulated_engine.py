"""What a simulated machine does in a step under the cost model: chunked prefill, decoding, a KV cache that fills up.

Requests are events (admitted, prefilled, finished), not rows of an array: a step costs the same whether ten or ten
thousand requests decode, and stretches in which nothing but decoding happens are one event. It knows nothing of shards
or fronts: `Simulator` decides what is admitted.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

import numpy as np

from blendserve.dual_scanner import Front
from blendserve.planner.prefill_queue import PrefillQueue
from blendserve.planner.simulated_cache import SimulatedCache
from blendserve.planner.simulation import SimulatedMachine, SimulatedRequests, SimulationResult, StepWork
from blendserve.planner.usage_recorder import UsageRecorder
from blendserve.planner.work_left import WorkLeft

_FINISHED, _OUTLIVED = 0, 1  # kinds of events, in the order in which those of one step are handled


class SimulatedEngine:
    """Requests that were started, until each has finished."""

    def __init__(self, requests: SimulatedRequests, machine: SimulatedMachine, usage: UsageRecorder) -> None:
        self._machine = machine
        self._constants = machine.constants
        self._cache = SimulatedCache(requests.tree)
        self._usage = usage
        self._left = WorkLeft(machine)
        self._prompt: list[int] = requests.num_prompt_tokens.tolist()
        self._read: list[int] = requests.read_tokens(machine.constants.prefix_readers).tolist()
        self._output: list[int] = np.maximum(requests.output_tokens, 1).tolist()
        num_requests = len(self._prompt)
        self._estimate = [1] * num_requests
        self._footprint = [0.0] * num_requests
        self._front = [Front.LEFT] * num_requests
        self._produced = [0] * num_requests  # output tokens when the request began to decode or was preempted
        self._joined = [-1] * num_requests  # step in which the request began to decode, -1 while it doesn't
        self._prefilling = PrefillQueue(machine.constants)
        self._preempted: deque[int] = deque()
        self._running: dict[int, None] = {}  # decoding requests, latest last
        self._finished: list[int] = []
        self._events: list[tuple[int, int, int, int]] = []  # (step, kind, request, step it joined)
        self._own_tokens = 0  # KV cache beyond shared prefixes
        self._context = 0  # KV tokens that the next decode step reads
        self._right_footprint = 0.0  # of the admitted requests that count as the right front's
        self._reserves_output = False  # whether output lengths are expected of requests, so that they can be outlived
        self._num_steps = 0
        self._last_end = 0  # the step in which the last one of the requests so far is expected to end
        self._seconds = self._compute = self._memory = 0.0
        self._cached_tokens = self._num_preemptions = 0

    def result(self) -> SimulationResult:
        """What has been done so far; prompt and output tokens are those of the finished requests."""
        return SimulationResult(
            seconds=self._seconds,
            compute_seconds=self._compute,
            memory_seconds=self._memory,
            num_steps=self._num_steps,
            num_prompt_tokens=sum(self._prompt[request] for request in self._finished),
            num_output_tokens=sum(self._output[request] for request in self._finished),
            num_cached_tokens=self._cached_tokens,
            num_preemptions=self._num_preemptions,
            usage=self._usage.usage(),
        )

    # Steps

    def _start(self, request: int) -> None:
        produced = self._produced[request]
        own = self._prompt[request] - self._cache.shared_tokens(request) + produced
        cached = self._cache.acquire(request)
        if not produced:
            self._cached_tokens += cached
        self._own_tokens += own
        if self._front[request] is Front.RIGHT:
            self._right_footprint += self._footprint[request]
        self._prefilling.append(request, cached, self._prompt[request] + produced)
        self._cache.shrink(self._machine.capacity_tokens - self._own_tokens)

    def _take_step(self, max_batched_tokens: int, prefill_seconds: float) -> None:
        most_tokens = max(max_batched_tokens - len(self._running), 1)
        compute, finished_prefill = self._prefilling.take(most_tokens, prefill_seconds)
        compute += len(self._running) * self._machine.decode_token_seconds
        self._account(self._machine.step(compute, self._context), 1)
        for request in finished_prefill:
            self._join(request)

    def _skip_to_next_event(self) -> None:
        """Decode until a request finishes or outlives its estimate, or the cache is full: all steps at once."""
        free = self._machine.capacity_tokens - self._own_tokens - self._cache.pinned_tokens
        until_full = free // len(self._running) + 1
        count = max(min(self._events[0][0] - self._num_steps, until_full), 1)
        self._account(self._machine.decode_steps(count, len(self._running), self._context), count)

    def _account(self, work: StepWork, num_steps: int) -> None:
        """`num_steps` steps have passed: every decoding request holds that many tokens more."""
        self._usage.add(work.seconds, work.compute, work.memory, self._own_tokens + self._cache.pinned_tokens)
        self._left.do(work)
        self._seconds += work.seconds
        self._compute += work.compute
        self._memory += work.memory
        self._context += num_steps * len(self._running)
        self._own_tokens += num_steps * len(self._running)
        self._num_steps += num_steps

    # Requests

    def _unfinished(self) -> list[int]:
        return [*self._running, *self._preempted, *self._prefilling.requests]

    def _count_produced(self, request: int) -> int:
        joined = self._joined[request]
        return self._produced[request] + (self._num_steps - joined if joined >= 0 else 0)

    def _join(self, request: int) -> None:
        """The request's prefill is done and with it one more output token: decode, or finish at once."""
        self._produced[request] += 1
        produced = self._produced[request]
        self._joined[request] = self._num_steps
        self._running[request] = None
        self._context += self._read[request] + produced
        self._own_tokens += 1
        end = self._num_steps + self._output[request] - produced
        heappush(self._events, (end, _FINISHED, request, self._num_steps))
        if self._reserves_output:
            self._await_end(request, max(self._estimate[request] - produced, 0))

    def _await_end(self, request: int, num_steps: int) -> None:
        """Look in `num_steps` steps whether the request has outlived its estimate."""
        heappush(self._events, (self._num_steps + num_steps, _OUTLIVED, request, self._joined[request]))
        self._last_end = max(self._last_end, self._num_steps + num_steps)

    def _handle_events(self) -> None:
        while self._events and self._events[0][0] <= self._num_steps:
            _, kind, request, joined = heappop(self._events)
            if self._joined[request] != joined:
                continue  # of a time before the request was preempted or finished
            if kind == _FINISHED:
                self._left.expect(self._read[request], self._estimate[request], self._output[request])
                self._leave(request)
                self._finish(request)
            elif self._count_produced(request) >= self._estimate[request]:
                self._relocate(request)

    def _finish(self, request: int) -> None:
        self._finished.append(request)

    def _relocate(self, request: int) -> None:
        """The request has outlived its estimate: expect as much again, and count it as one of the right front's."""
        more = self._estimate[request]
        self._left.expect(self._read[request], more, 2 * more)
        if self._front[request] is Front.LEFT:
            self._front[request] = Front.RIGHT
            self._right_footprint += self._footprint[request]
        self._lengthen(request, more)
        self._await_end(request, more)

    def _lengthen(self, request: int, num_tokens: int) -> None:
        self._estimate[request] += num_tokens
        self._footprint[request] += num_tokens / 2
        if self._front[request] is Front.RIGHT:
            self._right_footprint += num_tokens / 2

    def _leave(self, request: int) -> None:
        """Give back all that the request holds, whether it has finished or is preempted."""
        produced = self._count_produced(request)
        self._produced[request] = produced
        self._joined[request] = -1
        if self._front[request] is Front.RIGHT:
            self._right_footprint -= self._footprint[request]
        del self._running[request]
        self._context -= self._read[request] + produced
        self._own_tokens -= self._prompt[request] - self._cache.shared_tokens(request) + produced
        self._cache.release(request)

    def _preempt(self, request: int) -> None:
        self._leave(request)
        self._preempted.appendleft(request)
        self._num_preemptions += 1

    def _make_room(self) -> None:
        """Evict unused prefixes, then preempt the latest requests, until one more step fits."""
        capacity = self._machine.capacity_tokens
        while len(self._running) > 1 and (self._own_tokens + self._cache.pinned_tokens + len(self._running) > capacity):
            self._preempt(next(reversed(self._running)))
        self._cache.shrink(capacity - self._own_tokens)
