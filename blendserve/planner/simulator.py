"""Replays a shard step by step under the cost model: chunked prefill, continuous batching, a KV cache that fills up.

Requests are events (admitted, prefilled, finished), not rows of an array: a step costs the same whether ten or ten
thousand requests decode, and stretches in which nothing but decoding happens are one event.
"""

from __future__ import annotations

import math
from collections import deque
from heapq import heappop, heappush

import numpy as np

from blendserve.dual_scanner import DualScanner, Front
from blendserve.planner.memory_peak import peak_tokens
from blendserve.planner.prefill_queue import PrefillQueue
from blendserve.planner.simulated_cache import SimulatedCache
from blendserve.planner.simulation import (
    SimulatedMachine,
    SimulatedRequests,
    SimulatedShard,
    SimulationResult,
    StepWork,
)
from blendserve.planner.usage_recorder import UsageRecorder
from blendserve.planner.work_left import WorkLeft

_FINISHED, _OUTLIVED = 0, 1  # kinds of events, in the order in which those of one step are handled
_WATERMARK = 0.01  # of the cache, kept free by engines that know no output lengths
# Memory-heavy requests are admitted until a step's memory time is twice that of reading the weights, and as long as
# that will hold on the average of their lives within three times. More of them only make each step, and so each long
# output, take longer: steps are then full of both kinds of work anyway.
_WANTED_STEPS = 2.0
_MOST_STEPS = 3.0


class Simulator:
    """One machine. `assign` says what to admit, again whenever more is known; `run` goes on until all is done."""

    def __init__(self, requests: SimulatedRequests, machine: SimulatedMachine) -> None:
        self._machine = machine
        self._constants = machine.constants
        self._cache = SimulatedCache(requests.tree)
        self._usage = UsageRecorder()
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
        self._refused = (-1, 0, 0)  # request, finished and preempted requests when it last found no room
        self._num_steps = 0
        self._seconds = self._compute = self._memory = 0.0
        self._cached_tokens = self._num_preemptions = 0

    def begun_seconds(self) -> tuple[float, float]:
        """Compute and memory time that admitted requests still have to decode."""
        left = WorkLeft(self._machine)
        for request in self._unfinished():
            left.expect(self._read[request], self._count_produced(request), self._estimate[request])
        return left.compute, left.memory

    def assign(self, shard: SimulatedShard) -> None:
        """Admit `shard` from now on, instead of what was assigned before and hasn't been admitted."""
        self._scanner = DualScanner(
            compute_seconds=shard.compute_seconds,
            memory_seconds=shard.memory_seconds,
            unit_density=shard.unit_density,
            is_two_ended=shard.is_two_ended,
        )
        self._order: list[int] = shard.positions.tolist()
        self._is_two_ended, self._reserves_output = shard.is_two_ended, shard.reserves_output
        self._pace = shard.pace
        self._refused = (-1, 0, 0)
        lengths = zip(self._order, shard.estimated_output_tokens.tolist(), shard.footprint_tokens.tolist(), strict=True)
        for request, estimate, footprint in lengths:
            self._estimate[request] = max(estimate, 1)
            self._footprint[request] = footprint
        compute, memory = self.begun_seconds()
        self._left.assign(compute + float(shard.compute_seconds.sum()), memory + float(shard.memory_seconds.sum()))

    def run(self, until_seconds: float = math.inf) -> None:
        """Step until every request has finished, or up to the first step that ends after `until_seconds`."""
        while self._seconds < until_seconds:
            self._admit()
            if not self._running and not self._prefilling:
                break
            if self._prefilling:
                self._take_step()
            else:
                self._skip_to_next_event()
            self._handle_events()
            self._make_room()

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

    # Admission: preempted requests first, then the scanner's front, as long as there is room.

    def _admit(self) -> None:
        capacity = self._machine.capacity_tokens
        while self._preempted and self._fits(self._preempted[0], capacity):
            self._start(self._preempted.popleft())
        if self._preempted:
            return
        while len(self._running) + len(self._prefilling) < self._machine.max_num_seqs:
            front = self._next_front()
            if front is None:
                return
            request = self._order[self._scanner.peek(front)]
            if not self._fits(request, self._scanner.max_held_tokens(front, capacity)):
                return
            self._scanner.take(front)
            self._front[request] = front
            self._start(request)

    def _next_front(self) -> Front | None:
        """Left while this step lacks prefill tokens; else right, while steps lack memory work."""
        is_full = self._prefilling.num_tokens >= 2 * self._max_batched_tokens
        if self._scanner.num_remaining == 0 or is_full:
            return None
        if not self._is_two_ended:
            return Front.LEFT
        if self._prefilling.num_tokens * self._constants.seconds_per_layer_token < self._prefill_seconds():
            return Front.LEFT if self._running or self._prefilling else Front.RIGHT
        return Front.RIGHT if self._lacks_memory_work() else None

    def _lacks_memory_work(self) -> bool:
        """Whether the next request at the right front may be admitted; the fronts' shares are the cap."""
        if not self._running:
            return True
        footprint = self._footprint[self._order[self._scanner.peek(Front.RIGHT)]]
        held = self._right_footprint + footprint
        a_step = self._machine.step_seconds / self._constants.seconds_per_kv_token
        if a_step > 0 and (self._context >= _WANTED_STEPS * a_step or held > _MOST_STEPS * a_step):
            return False
        return held <= self._scanner.max_held_tokens(Front.RIGHT, self._machine.capacity_tokens)

    def _fits(self, request: int, capacity: float) -> bool:
        """Whether the cache has room for the request and, where output is reserved, will have until it ends."""
        if not self._running and not self._prefilling:
            return True
        produced = self._produced[request]
        held = self._prompt[request] - self._cache.shared_tokens(request) + produced
        held += self._cache.missing_tokens(request) + self._own_tokens + self._cache.pinned_tokens
        if not self._reserves_output:
            return held <= capacity * (1 - _WATERMARK)
        rest = max(self._estimate[request] - produced, 1)
        if held + rest * (len(self._running) + len(self._prefilling) + 1) <= capacity:
            return True
        attempt = (request, len(self._finished), self._num_preemptions)
        if attempt == self._refused:
            return False  # nothing has given anything back since
        if held + rest <= capacity and self._peak(held, rest) <= capacity:
            return True
        self._refused = attempt
        return False

    def _peak(self, held: int, rest: int) -> int:
        requests = [*self._running, *self._prefilling.requests]
        produced = np.array([self._count_produced(request) for request in requests])
        remaining = np.array([self._estimate[request] for request in requests]) - produced
        own = np.array([self._prompt[request] - self._cache.shared_tokens(request) for request in requests]) + produced
        return peak_tokens(held, own, remaining, rest)

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

    # Steps

    @property
    def _max_batched_tokens(self) -> int:
        machine = self._machine
        return machine.max_batched_tokens if self._reserves_output else machine.unplanned_batched_tokens

    def _prefill_seconds(self) -> float:
        """Compute time of the prefill in this step: what the decoding requests' memory time leaves unused.

        Over the whole job compute and memory time stand in the ratio of what remains of both; a step that keeps to it
        leaves neither idle, whatever the phases of the running requests are.
        """
        if not self._reserves_output or not self._machine.is_overlapped:
            return math.inf
        density = self._left.density if self._pace is None else self._pace
        wanted = density * self._context * self._constants.seconds_per_kv_token
        return max(wanted, self._machine.step_seconds) - len(self._running) * self._machine.decode_token_seconds

    def _take_step(self) -> None:
        most_tokens = max(self._max_batched_tokens - len(self._running), 1)
        compute, finished_prefill = self._prefilling.take(most_tokens, self._prefill_seconds())
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

    def _handle_events(self) -> None:
        while self._events and self._events[0][0] <= self._num_steps:
            _, kind, request, joined = heappop(self._events)
            if self._joined[request] != joined:
                continue  # of a time before the request was preempted or finished
            if kind == _FINISHED:
                self._left.expect(self._read[request], self._estimate[request], self._output[request])
                self._leave(request)
                self._finished.append(request)
            elif self._count_produced(request) >= self._estimate[request]:
                self._relocate(request)

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

    def _make_room(self) -> None:
        """Evict unused prefixes, then preempt the latest requests, until one more step fits."""
        capacity = self._machine.capacity_tokens
        while len(self._running) > 1 and (self._own_tokens + self._cache.pinned_tokens + len(self._running) > capacity):
            request = next(reversed(self._running))
            self._leave(request)
            self._preempted.appendleft(request)
            self._num_preemptions += 1
        self._cache.shrink(capacity - self._own_tokens)
