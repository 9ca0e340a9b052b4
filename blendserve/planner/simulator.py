"""Replays a shard step by step: which requests are admitted when, by the policy that the shard was planned with."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from blendserve.admission_rate import READMITTED_SHARE, AdmissionRate, StepCosts, WorkAhead
from blendserve.dual_scanner import DualScanner, Front
from blendserve.length_learning import LengthLearner, surplus
from blendserve.planner.memory_peak import peak_tokens
from blendserve.planner.simulated_engine import SimulatedEngine
from blendserve.planner.simulation import SimulatedMachine, SimulatedRequests, SimulatedShard
from blendserve.planner.usage_recorder import UsageRecorder
from blendserve.planner.work_left import WorkLeft
from blendserve.step_tokens import prefill_tokens

_WATERMARK = 0.01  # of the cache, kept free by engines that know no output lengths


class Simulator(SimulatedEngine):
    """One machine and one shard of a plan."""

    def __init__(
        self,
        requests: SimulatedRequests,
        machine: SimulatedMachine,
        shard: SimulatedShard,
        usage: UsageRecorder | None = None,
    ) -> None:
        """usage: what the machine has done before, on whose time axis this shard goes on."""
        super().__init__(requests, machine, usage or UsageRecorder())
        self._scanner = DualScanner(
            compute_seconds=shard.compute_seconds,
            memory_seconds=shard.memory_seconds,
            unit_density=shard.unit_density,
            is_two_ended=shard.is_two_ended,
        )
        self._order: list[int] = shard.positions.tolist()
        self._is_two_ended, self._reserves_output = shard.is_two_ended, shard.reserves_output
        self._looks_ahead = shard.reserves_output or machine.unplanned_batched_tokens is None
        self._rate = AdmissionRate(self._scanner, shard.pace)
        self._costs = StepCosts(
            token=machine.decode_token_seconds,
            kv_token=machine.constants.seconds_per_kv_token,
            weights=machine.step_seconds,
        )
        self._refused = (-1, 0, 0)  # request, finished and preempted requests when it last found no room
        self._expect(shard.estimated_output_tokens, shard.footprint_tokens)
        if shard.begun_tokens is not None:
            for request, begun in zip(self._order, shard.begun_tokens.tolist(), strict=True):
                self._produced[request] = begun
        self._left.assign(float(shard.compute_seconds.sum()), float(shard.memory_seconds.sum()))
        self._learner = None if shard.lengths is None else LengthLearner(shard.lengths, self._scanner)
        self._position = {request: position for position, request in enumerate(self._order)} if self._learner else {}

    def run(self) -> None:
        """Step until every request has finished."""
        while True:
            if self._learner and self._learner.is_due(self._num_steps):
                self._learn(self._learner)
            self._admit()
            if not self._running and not self._prefilling:
                break
            if self._prefilling:
                self._take_step(self._max_batched_tokens, self._prefill_seconds())
            else:
                self._skip_to_next_event()
            self._handle_events()
            self._make_room()

    # Learning: what has finished and how far the others are tells how long those will be that wait.

    def _learn(self, learner: LengthLearner) -> None:
        begun, preempted = self._unfinished(), set(self._preempted)
        produced = np.array([self._count_produced(request) for request in begun], dtype=np.int64)
        positions = np.array([self._position[request] for request in begun], dtype=np.int64)
        expected = learner.revise(positions, produced)
        for request, tokens, num_produced in zip(begun, expected.tolist(), produced.tolist(), strict=True):
            if request in preempted:
                self._footprint[request] += (tokens - self._estimate[request]) / 2
                self._estimate[request] = tokens
                continue
            self._lengthen(request, tokens - self._estimate[request])
            if request in self._running:
                self._await_end(request, tokens - num_produced)
        self._shed()
        waiting = self._scanner.remaining
        estimates, footprints = learner.estimated_tokens[waiting].tolist(), learner.footprint_tokens[waiting].tolist()
        for position, estimate, footprint in zip(waiting.tolist(), estimates, footprints, strict=True):
            request = self._order[position]
            self._estimate[request], self._footprint[request] = estimate, footprint
        self._refused = (-1, 0, 0)
        begun_work = self._begun_work()
        compute, memory = self._scanner.compute_remaining, self._scanner.memory_remaining
        self._left.assign(begun_work.compute + compute, begun_work.memory + memory)

    def _shed(self) -> None:
        """Preempt memory-heavy requests that together will outgrow the cache, before they have grown."""
        long = [request for request in self._running if self._front[request] is Front.RIGHT]
        produced = np.array([self._count_produced(request) for request in long], dtype=np.int64)
        prompts = np.array([self._prompt[request] - self._cache.shared_tokens(request) for request in long])
        rest = np.array([self._estimate[request] for request in long], dtype=np.int64) - produced
        for index in surplus(prompts + produced, rest, self._machine.capacity_tokens).tolist():
            self._preempt(long[index])

    def _expect(self, estimates: NDArray[np.int64], footprints: NDArray[np.float64]) -> None:
        for request, estimate, footprint in zip(self._order, estimates.tolist(), footprints.tolist(), strict=True):
            self._estimate[request] = max(estimate, 1)
            self._footprint[request] = footprint

    def _begun_work(self) -> WorkLeft:
        """What admitted requests still have to decode."""
        left = WorkLeft(self._machine)
        for request in self._unfinished():
            left.expect(self._read[request], self._count_produced(request), self._estimate[request])
        return left

    def _finish(self, request: int) -> None:
        super()._finish(request)
        if self._learner:
            self._learner.finish(self._position[request], self._output[request], is_cut_off=False)

    # Admission: preempted requests first, then the scanner's front, as long as there is room.

    def _admit(self) -> None:
        capacity = self._machine.capacity_tokens
        room = capacity * READMITTED_SHARE if self._is_two_ended else capacity
        while self._preempted and self._fits(self._preempted[0], room):
            self._start(self._preempted.popleft())
        if self._preempted and not self._is_two_ended:
            return
        while len(self._running) + len(self._prefilling) < self._machine.max_num_seqs:
            front = self._next_front()
            if front is None or (self._preempted and front is Front.RIGHT):
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
        """Whether the next request at the right front may be admitted."""
        if not self._running:
            return True
        footprint = self._footprint[self._order[self._scanner.peek(Front.RIGHT)]]
        return self._rate.lacks_memory_work(
            self._costs,
            self._work_ahead(),
            right_tokens=self._right_footprint + footprint,
            capacity_tokens=self._machine.capacity_tokens,
        )

    def _work_ahead(self) -> WorkAhead:
        return WorkAhead(
            num_decodes=len(self._running),
            context_tokens=self._context,
            compute_seconds=self._left.compute,
            memory_seconds=self._left.memory,
            num_steps=self._last_end - self._num_steps,
        )

    def _fits(self, request: int, capacity: float) -> bool:
        """Whether the cache has room for the request and, where output is reserved, will have until it ends."""
        if not self._running and not self._prefilling:
            return True
        produced = self._produced[request]
        held = self._prompt[request] - self._cache.shared_tokens(request) + produced
        held += self._cache.missing_tokens(request) + self._own_tokens + self._cache.pinned_tokens
        if not self._looks_ahead:
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

    # Steps

    @property
    def _max_batched_tokens(self) -> int:
        machine, num_running = self._machine, len(self._running)
        if self._reserves_output and machine.is_overlapped:
            return machine.max_batched_tokens
        if not self._reserves_output and machine.unplanned_batched_tokens is not None:
            return machine.unplanned_batched_tokens
        return num_running + prefill_tokens(num_running, machine.max_batched_tokens)

    def _prefill_seconds(self) -> float:
        """Compute time of the prefill in this step."""
        if not self._reserves_output or not self._machine.is_overlapped:
            return math.inf
        return self._rate.prefill_seconds(self._costs, self._work_ahead())
