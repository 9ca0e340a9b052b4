"""Replays a shard by the timetable that the engine would follow: lengths known, nothing overlapped."""

from __future__ import annotations

import numpy as np

from blendserve.dual_scanner import Front
from blendserve.known_lengths import KnownLengths
from blendserve.planner.simulation import SimulatedMachine, SimulatedRequests, SimulatedShard, StepWork
from blendserve.planner.simulator import Simulator
from blendserve.planner.usage_recorder import UsageRecorder
from blendserve.step_tokens import padded_tokens
from blendserve.timetable import Timetable, make_timetable

_IS_START = -2  # what an event says instead of the step that its request joined: stop here, there is more to begin


def timetable_for(requests: SimulatedRequests, machine: SimulatedMachine, shard: SimulatedShard) -> Timetable | None:
    """The timetable that the engine would make for the shard, or None where it would go on from both fronts."""
    is_known = shard.lengths is None and shard.pace is None and shard.begun_tokens is None
    if not (shard.is_two_ended and is_known) or machine.is_overlapped:
        return None
    lengths = KnownLengths(
        requests.num_prompt_tokens[shard.positions], shard.estimated_output_tokens, shard.shared_tokens
    )
    return make_timetable(
        lengths,
        capacity_tokens=machine.capacity_tokens,
        block_size=machine.block_size,
        max_num_seqs=machine.max_num_seqs,
        max_step_tokens=machine.max_batched_tokens,
    )


class TimetabledSimulator(Simulator):
    """One machine and one shard of a plan, with the steps in which its requests begin."""

    def __init__(
        self,
        requests: SimulatedRequests,
        machine: SimulatedMachine,
        shard: SimulatedShard,
        timetable: Timetable,
        usage: UsageRecorder,
    ) -> None:
        super().__init__(requests, machine, shard, usage)
        self._timetable = timetable
        self._scanner.follow(timetable.order)
        self._tokens_left = int(timetable.lengths.computed_tokens.sum())  # for steps to compute
        self._timed_tokens = 0  # of prompts whose time has come, to be computed now
        self._step_tokens = 0
        for position in np.flatnonzero(~timetable.is_flexible).tolist():
            self._events.append((int(timetable.starts[position]), 0, self._order[position], _IS_START))
        self._events.sort()

    @property
    def _max_batched_tokens(self) -> int:
        return self._step_tokens

    def _account(self, work: StepWork, num_steps: int) -> None:
        self._tokens_left -= num_steps * len(self._running)
        super()._account(work, num_steps)

    def _take_step(self, max_batched_tokens: int, prefill_seconds: float) -> None:
        waiting = self._prefilling.num_tokens
        super()._take_step(max_batched_tokens, prefill_seconds)
        computed = waiting - self._prefilling.num_tokens
        self._tokens_left -= computed
        self._timed_tokens = max(self._timed_tokens - computed, 0)

    def _admit(self) -> None:
        table = self._timetable
        while self._preempted and self._fits(self._preempted[0], self._machine.capacity_tokens):
            self._start(self._preempted.popleft())
        waiting = self._prefilling.num_tokens
        while self._is_free and self._is_due(table) and self._begin(Front.RIGHT):
            pass
        self._timed_tokens += self._prefilling.num_tokens - waiting
        even = table.step_tokens(self._num_steps, max(self._tokens_left, 0))
        needed = padded_tokens(len(self._running) + self._timed_tokens)
        self._step_tokens = min(max(even, needed), self._machine.max_batched_tokens)
        room = self._step_tokens - len(self._running)
        while self._is_free and self._prefilling.num_tokens < room:
            if not table.is_flexible[self._scanner.peek(Front.LEFT)] or not self._begin(Front.LEFT):
                return

    @property
    def _is_free(self) -> bool:
        """Whether a request could begin."""
        num_begun = len(self._running) + len(self._prefilling)
        return self._scanner.num_remaining > 0 and not self._preempted and num_begun < self._machine.max_num_seqs

    def _is_due(self, table: Timetable) -> bool:
        """Whether the next request that isn't flexible should begin: it is time, or nothing else is left to do."""
        position = self._scanner.peek(Front.RIGHT)
        if table.is_flexible[position]:
            return False
        is_idle = not self._running and not self._prefilling and not table.is_flexible[self._scanner.peek(Front.LEFT)]
        return is_idle or table.is_due(position, self._num_steps, self._own_tokens + self._cache.pinned_tokens)

    def _begin(self, front: Front) -> bool:
        """Start the request at `front`; False where it finds no room."""
        request = self._order[self._scanner.peek(front)]
        if not self._fits(request, self._machine.capacity_tokens):
            return False
        self._scanner.take(front)
        self._front[request] = front
        self._start(request)
        return True
