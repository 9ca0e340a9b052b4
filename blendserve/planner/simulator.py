"""Replays a shard step by step under the cost model: chunked prefill, continuous batching, a KV cache that fills up.

Requests are events (admitted, prefilled, finished), not rows of an array: a step costs the same whether ten or ten
thousand requests decode, and stretches in which nothing but decoding happens are one event.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush

import numpy as np

from blendserve.dual_scanner import DualScanner, Front
from blendserve.planner.simulated_cache import SimulatedCache
from blendserve.planner.simulation import SimulatedMachine, SimulatedShard, SimulationResult

_FINISHED, _OUTLIVED = 0, 1  # kinds of events, in the order in which those of one step are handled


class Simulator:
    """One shard on one machine. `run()` returns the totals; an instance runs once."""

    def __init__(self, shard: SimulatedShard, machine: SimulatedMachine) -> None:
        self._machine = machine
        self._constants = machine.constants
        self._cache = SimulatedCache(shard.tree)
        self._scanner = DualScanner(
            compute_seconds=shard.compute_seconds,
            memory_seconds=shard.memory_seconds,
            unit_density=shard.unit_density,
            is_two_ended=shard.is_two_ended,
        )
        self._is_two_ended = shard.is_two_ended
        self._position: list[int] = shard.positions.tolist()
        self._prompt: list[int] = shard.num_prompt_tokens.tolist()
        self._output: list[int] = np.maximum(shard.output_tokens, 1).tolist()
        self._estimate: list[int] = np.maximum(shard.estimated_output_tokens, 1).tolist()
        self._compute_left = float(shard.compute_seconds.sum())
        self._memory_left = float(shard.memory_seconds.sum())
        num_requests = len(self._position)
        self._front = [Front.LEFT] * num_requests
        self._produced = [0] * num_requests  # output tokens that a preempted request has already
        self._joined = [-1] * num_requests  # step in which the request began to decode, -1 while it doesn't
        self._prefilling: deque[list[int]] = deque()  # [request, tokens computed, tokens to compute up to]
        self._preempted: deque[int] = deque()
        self._running: dict[int, None] = {}  # decoding requests, latest last
        self._events: list[tuple[int, int, int, int]] = []  # (step, kind, request, step it joined)
        self._queued_tokens = 0  # admitted, not computed
        self._own_tokens = 0  # KV cache beyond shared prefixes
        self._growth = 0  # tokens that running requests are still expected to add
        self._context = 0  # KV tokens that the next decode step reads
        self._reserved = {Front.LEFT: 0, Front.RIGHT: 0}  # prompt and estimated output of the admitted requests
        self._step = 0
        self._seconds = self._compute = self._memory = 0.0
        self._cached_tokens = self._num_preemptions = 0

    def run(self) -> SimulationResult:
        """Step until every request has finished."""
        while True:
            self._admit()
            if not self._running and not self._prefilling:
                break
            if self._prefilling:
                self._take_step()
            else:
                self._skip_to_next_event()
            self._handle_events()
            self._make_room()
        return SimulationResult(
            seconds=self._seconds,
            compute_seconds=self._compute,
            memory_seconds=self._memory,
            num_steps=self._step,
            num_prompt_tokens=sum(self._prompt),
            num_output_tokens=sum(self._output),
            num_cached_tokens=self._cached_tokens,
            num_preemptions=self._num_preemptions,
        )

    # Admission: preempted requests first, then the scanner's front, as long as there is room.

    def _admit(self) -> None:
        while self._preempted and self._fits(self._preempted[0]):
            self._start(self._preempted.popleft())
        if self._preempted:
            return
        while True:
            front = self._next_front()
            if front is None:
                return
            request = self._scanner.peek(front)
            if not self._fits(request):
                return
            self._scanner.take(front)
            self._front[request] = front
            self._start(request)

    def _next_front(self) -> Front | None:
        """Left while this step lacks prefill tokens; else right, as far as it leaves the left front its share."""
        if not self._is_two_ended:
            is_full = self._queued_tokens >= 2 * self._machine.max_batched_tokens
            return None if is_full else self._scanner.next_front(0, 0, 1)
        if self._scanner.num_remaining == 0:
            return None
        if self._queued_tokens < self._prefill_budget():
            return Front.LEFT if self._running or self._prefilling else Front.RIGHT
        request = self._scanner.peek(Front.RIGHT)
        held = self._reserved[Front.RIGHT] + self._prompt[request] + self._estimate[request]
        room = self._scanner.max_held_tokens(Front.RIGHT, self._machine.capacity_tokens)
        return Front.RIGHT if held <= room else None

    def _fits(self, request: int) -> bool:
        """Whether the cache has room for the request and for what all running ones are expected to add."""
        if not self._running and not self._prefilling:
            return True
        own = self._prompt[request] - self._cache.shared_tokens(self._position[request])
        rest = max(self._estimate[request] - self._produced[request], 0)
        needed = own + self._produced[request] + rest + self._cache.missing_tokens(self._position[request])
        return needed + self._own_tokens + self._growth + self._cache.pinned_tokens <= self._machine.capacity_tokens

    def _start(self, request: int) -> None:
        position, produced = self._position[request], self._produced[request]
        own = self._prompt[request] - self._cache.shared_tokens(position) + produced
        cached = self._cache.acquire(position)
        if not produced:
            self._cached_tokens += cached
        self._own_tokens += own
        self._reserved[self._front[request]] += self._prompt[request] + self._estimate[request]
        self._growth += self._estimate[request] - produced
        last = self._prompt[request] + produced
        self._queued_tokens += max(last - cached, 1)
        self._prefilling.append([request, min(cached, last - 1), last])
        self._cache.shrink(self._machine.capacity_tokens - self._own_tokens)

    # Steps

    def _prefill_budget(self) -> float:
        """Tokens to prefill in this step: what compute time the decoding requests' memory time leaves unused.

        Over the whole job compute and memory time stand in the ratio of what remains of both; a step that keeps to it
        leaves neither idle, whatever the phases of the running requests are.
        """
        most = self._machine.max_batched_tokens - len(self._running)
        if not self._is_two_ended or not self._machine.is_overlapped:
            return most
        constants = self._constants
        density = self._compute_left / max(self._memory_left, 1e-9)
        wanted = density * self._context * constants.seconds_per_kv_token
        decode = len(self._running) * (constants.seconds_per_layer_token + constants.seconds_per_sampled_token)
        per_token = constants.seconds_per_layer_token
        least = self._machine.step_seconds / per_token
        return min(max((wanted - decode) / per_token, least - len(self._running), 1), most)

    def _take_step(self) -> None:
        budget = int(max(self._prefill_budget(), 1))
        tokens = pairs = sampled = 0
        finished_prefill = []
        while budget > 0 and self._prefilling:
            chunk = self._prefilling[0]
            count = min(budget, chunk[2] - chunk[1])
            pairs += count * (2 * chunk[1] + count)
            chunk[1] += count
            tokens += count
            budget -= count
            if chunk[1] == chunk[2]:
                self._prefilling.popleft()
                finished_prefill.append(chunk[0])
                sampled += 1
        self._queued_tokens -= tokens
        if not self._prefilling:
            self._queued_tokens = 0
        num_decoding = len(self._running)
        constants = self._constants
        compute = (
            (tokens + num_decoding) * constants.seconds_per_layer_token
            + (sampled + num_decoding) * constants.seconds_per_sampled_token
            + pairs / 2 * constants.seconds_per_attended_pair
        )
        self._account(max(compute, self._machine.step_seconds), self._context * constants.seconds_per_kv_token, compute)
        self._grow(1)
        for request in finished_prefill:
            self._join(request)

    def _skip_to_next_event(self) -> None:
        """Decode until a request finishes or outlives its estimate, or the cache is full: all steps at once."""
        count = max(self._events[0][0] - self._step, 1)
        num_decoding = len(self._running)
        free = self._machine.capacity_tokens - self._own_tokens - self._cache.pinned_tokens
        count = max(min(count, free // num_decoding + 1), 1)
        constants = self._constants
        compute = num_decoding * (constants.seconds_per_layer_token + constants.seconds_per_sampled_token)
        step_compute = max(compute, self._machine.step_seconds)
        first = self._context * constants.seconds_per_kv_token
        slope = num_decoding * constants.seconds_per_kv_token
        memory = count * first + slope * count * (count - 1) / 2
        self._compute += count * step_compute
        self._memory += memory
        self._compute_left -= count * compute
        self._memory_left -= memory
        if self._machine.is_overlapped:  # the first steps may be bound by compute, the later ones by memory
            bound = int(min(max(np.ceil((step_compute - first) / slope), 0), count))
            later = count - bound
            self._seconds += (
                bound * step_compute + later * first + slope * (count * (count - 1) - bound * (bound - 1)) / 2
            )
        else:
            self._seconds += count * step_compute + memory
        self._grow(count)

    def _account(self, step_compute: float, memory: float, compute: float) -> None:
        self._compute += step_compute
        self._memory += memory
        self._compute_left -= compute
        self._memory_left -= memory
        self._seconds += max(step_compute, memory) if self._machine.is_overlapped else step_compute + memory

    def _grow(self, count: int) -> None:
        """`count` steps have passed: every decoding request holds that many tokens more."""
        num_decoding = len(self._running)
        self._context += count * num_decoding
        self._own_tokens += count * num_decoding
        self._growth -= count * num_decoding
        self._step += count

    # Events

    def _join(self, request: int) -> None:
        """The request's prefill is done and with it one more output token: decode, or finish at once."""
        self._produced[request] += 1
        self._growth -= 1
        rest = self._output[request] - self._produced[request]
        self._joined[request] = self._step
        self._running[request] = None
        self._context += self._prompt[request] + self._produced[request]
        self._own_tokens += 1
        expected = max(self._estimate[request] - self._produced[request], 0)
        heappush(self._events, (self._step + expected, _OUTLIVED, request, self._step))
        heappush(self._events, (self._step + rest, _FINISHED, request, self._step))

    def _handle_events(self) -> None:
        while self._events and self._events[0][0] <= self._step:
            _, kind, request, joined = heappop(self._events)
            if self._joined[request] != joined:
                continue  # of a time before the request was preempted or finished
            if kind == _OUTLIVED:
                self._expect_more(request)
            else:
                self._leave(request)

    def _expect_more(self, request: int) -> None:
        """The request has outlived its estimate: expect as much again, so that the room it will take is counted."""
        more = self._estimate[request]
        self._estimate[request] += more
        self._growth += more
        self._reserved[self._front[request]] += more
        heappush(self._events, (self._step + more, _OUTLIVED, request, self._joined[request]))

    def _leave(self, request: int) -> None:
        """Give back all that the request holds, whether it has finished or is preempted."""
        decoded = self._step - self._joined[request]
        self._produced[request] += decoded
        self._joined[request] = -1
        produced = self._produced[request]
        self._growth -= self._estimate[request] - produced
        own = self._prompt[request] - self._cache.shared_tokens(self._position[request]) + produced
        self._reserved[self._front[request]] -= self._prompt[request] + self._estimate[request]
        del self._running[request]
        self._context -= self._prompt[request] + produced
        self._own_tokens -= own
        self._cache.release(self._position[request])

    def _make_room(self) -> None:
        """Evict unused prefixes, then preempt the latest requests, until one more step fits."""
        capacity = self._machine.capacity_tokens
        while len(self._running) > 1 and (self._own_tokens + self._cache.pinned_tokens + len(self._running) > capacity):
            request = next(reversed(self._running))
            self._leave(request)
            self._preempted.appendleft(request)
            self._num_preemptions += 1
        self._cache.shrink(capacity - self._own_tokens)
