"""When each request of a shard should begin so that the KV cache is full from the first step to the last.

For shards whose output lengths are known, and engines that compute and read memory one after the other: what a run
takes then depends on how many steps it has, and that on how full the cache is. Admitted greedily, long requests start
together, fill the cache as they grow and end together, and what waited for them runs in a cache that is half empty.

The longest requests begin one after the other, the fewer the earlier, since those that began first hold most; all
others that generate much begin where the cache has room for them for as long as they run, the longer ones first.
Requests that share prompts or generate little begin in the shard's order, backwards, as many in each step as make it
compute its part of what is left: their prompts are most of that, and long steps take longer for each token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from blendserve.step_tokens import LEAST_STEP_TOKENS, PADDING, STEP_TOKENS

# A timetable is divided into about 256 slots, or into as many as let the longest request run through 96 of them, but
# into no more than 2,048.
_SLOTS: Final = 256
_SLOTS_OF_LONGEST: Final = 96
_MOST_SLOTS: Final = 2048
_MOST_PLACED: Final = 200_000  # requests in all trials together, which take about 50 us each
_LITTLE: Final = 100  # output tokens
_ROOM: Final = 0.92  # share of the cache, and of the rows, that is planned with: requests begin a few steps late
_FILLED: Final = 0.6  # of the cache during the longest request's life, below which there is room enough anyway
_STRETCH: Final = 1.03  # by which a timetable becomes longer where requests don't fit
_MOST_STRETCH: Final = 3.0
_UNDERUSED: Final = 0.4  # share of the planned use below which requests begin before their time
# The longest requests are those within a share of the longest; the n-th of N begins at (n / N) ** power of its latest.
_LONGEST: Final = ((1.0, 0.3), (1.0, 0.4), (1.0, 0.5), (1.0, 0.7), (0.9, 0.5), (0.9, 0.7), (0.75, 0.5), (0.75, 0.7))
_MUCH_SHARED: Final = 0.1  # of a prompt
_LEAST_SHARED: Final = 32  # tokens
_GOLDEN: Final = (5**0.5 - 1) / 2  # its multiples, modulo 1, are spread evenly however many there are


@dataclass(frozen=True, slots=True)
class KnownLengths:
    """Of a shard's requests, by position [num_requests].

    prompt_tokens, output_tokens, shared_tokens: int64; the last is what a prompt has in common with the one before.
    """

    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    shared_tokens: NDArray[np.int64]

    @property
    def is_shared(self) -> NDArray[np.bool_]:
        """bool [num_requests]: whether much of a prompt is in common with a neighbour's: they are computed together."""
        with_previous = self.shared_tokens > np.maximum(_MUCH_SHARED * self.prompt_tokens, _LEAST_SHARED)
        found: NDArray[np.bool_] = with_previous | np.append(with_previous[1:], False)[: len(with_previous)]
        return found

    @property
    def computed_tokens(self) -> NDArray[np.int64]:
        """int64 [num_requests]: what steps compute of each request, if prefixes are shared; its last token never is."""
        return self.prompt_tokens - self.shared_tokens + np.maximum(self.output_tokens - 1, 0)


@dataclass(frozen=True, slots=True)
class Timetable:
    """starts: int64 [num_requests], by position, the step in which each request should begin, counted from 0.

    is_flexible: bool [num_requests], which may begin whenever a step has room for their prompts. num_steps: the steps
    in all. used_tokens: float64 [num_slots], KV cache that the others will hold in each `slot_steps` steps.
    """

    starts: NDArray[np.int64]
    is_flexible: NDArray[np.bool_]
    num_steps: int
    used_tokens: NDArray[np.float64]
    slot_steps: int
    lengths: KnownLengths

    @property
    def order(self) -> NDArray[np.int64]:
        """Positions: first the flexible ones, then the others from the last to the first, of one step the longest.

        The flexible ones as they stand in the shard, but backwards: those that generate least are its first, and little
        should be left to generate once the last has begun.
        """
        timed = np.flatnonzero(~self.is_flexible)
        from_last = np.lexsort((self.lengths.output_tokens[timed], -self.starts[timed]))
        return np.concatenate((np.flatnonzero(self.is_flexible)[::-1], timed[from_last]))

    def is_due(self, position: int, step: int, held_tokens: int) -> bool:
        """Whether a request should begin: it is time, or the cache holds much less than was planned for now."""
        slot = min(step // self.slot_steps, len(self.used_tokens) - 1)
        return step >= int(self.starts[position]) or held_tokens < _UNDERUSED * float(self.used_tokens[slot])

    def step_tokens(self, step: int, num_left: int) -> int:
        """How many tokens a step should compute for all steps to compute as many. num_left: tokens, this step's too."""
        even = num_left / max(self.num_steps - step, 1)
        return max(round(even / PADDING) * PADDING, LEAST_STEP_TOKENS)


def make_timetable(
    lengths: KnownLengths,
    *,
    capacity_tokens: int,
    block_size: int,
    max_num_seqs: int,
    max_step_tokens: int,
) -> Timetable | None:
    """The shortest timetable that is found; None where it is of no use: the cache is never full, or there is too much.

    max_num_seqs: requests that can run at one time. max_step_tokens: what a step can compute.
    """
    room, most_running = _ROOM * capacity_tokens, _ROOM * max_num_seqs
    longest = int(lengths.output_tokens.max(initial=0))
    largest = int((lengths.prompt_tokens + lengths.output_tokens).max(initial=0))
    held = float((lengths.prompt_tokens * lengths.output_tokens + lengths.output_tokens**2 / 2).sum())
    if largest > room or held <= _FILLED * longest * room:
        return None
    step_tokens = min(STEP_TOKENS, max_step_tokens)
    by_memory = max(float(longest), held / room, float(lengths.output_tokens.sum()) / most_running)

    def shortest(num_tokens: int, most_steps: float = math.inf) -> Timetable | None:
        """In which steps compute `num_tokens` evenly, and which has less than `most_steps`."""
        least = max(by_memory, num_tokens / step_tokens)
        num_steps, num_placed = least, 0
        while num_steps <= _MOST_STRETCH * least and num_steps < most_steps and num_placed <= _MOST_PLACED:
            packing = _Packing(lengths, int(num_steps), room, most_running, unfilled_tokens=block_size // 2)
            for share, power in _LONGEST:
                found = packing.place(share, power)
                if packing.num_placed == 0:
                    return None
                if found is not None:
                    return found
            num_placed += packing.num_placed
            num_steps *= _STRETCH
        return None

    num_tokens = int(lengths.computed_tokens.sum())
    table = shortest(num_tokens)
    if table is None or num_tokens <= by_memory * step_tokens:
        return table
    # The prompts of what begins at once make the first steps longer: there is less for all others.
    begins_at_once = ~table.is_flexible & (table.starts == 0)
    at_once = int((lengths.prompt_tokens - lengths.shared_tokens)[begins_at_once].sum())
    return shortest(num_tokens - at_once, table.num_steps) or table


class _Packing:
    """A timetable of given length being made."""

    def __init__(
        self,
        lengths: KnownLengths,
        num_steps: int,
        room_tokens: float,
        most_running: float,
        *,
        unfilled_tokens: int,
    ) -> None:
        self._lengths = lengths
        self._room, self._most_running = room_tokens, most_running
        self._unfilled = unfilled_tokens  # of each request's last block
        longest = int(lengths.output_tokens.max(initial=0))
        self._slot = max(min(num_steps // _SLOTS, longest // _SLOTS_OF_LONGEST), num_steps // _MOST_SLOTS, 1)
        self._num_steps = num_steps
        self._is_flexible = lengths.is_shared | (lengths.output_tokens <= max(_LITTLE, 4 * self._slot))
        self._starts = np.zeros(len(self._is_flexible), dtype=np.int64)
        self._used = np.zeros(num_steps // self._slot + 2)
        self._running = np.zeros_like(self._used)
        self._spread(np.flatnonzero(self._is_flexible)[::-1])
        others = np.flatnonzero(~self._is_flexible)
        self._others = others[np.argsort(-lengths.output_tokens[others], kind="stable")]
        self.num_placed = 0  # in all trials

    def _spread(self, rows: NDArray[np.int64]) -> None:
        """Let `rows` begin in order, evenly by their tokens."""
        if len(rows) == 0:
            return
        output = self._lengths.output_tokens[rows]
        tokens = np.cumsum(self._lengths.computed_tokens[rows])
        share = (tokens - tokens[0]) / max(int(tokens[-1]), 1)
        starts = np.minimum(share * self._num_steps, np.maximum(self._num_steps - output, 0)).astype(np.int64)
        self._starts[rows] = starts = np.minimum.accumulate(starts[::-1])[::-1]  # none after the next one
        first, end = starts // self._slot, -(-(starts + output) // self._slot)
        held = self._lengths.prompt_tokens[rows] + output + self._unfilled
        for total, values in ((self._used, held), (self._running, np.ones_like(held))):
            changes = np.bincount(first, values, len(total)) - np.bincount(end, values, len(total))
            total += np.cumsum(changes)

    def place(self, share: float, power: float) -> Timetable | None:
        """Place all others, those within `share` of the longest as `_LONGEST` says; None where one finds no room."""
        output = self._lengths.output_tokens[self._others]
        used, running, starts = self._used.copy(), self._running.copy(), self._starts.copy()

        def begin_at(begin: int, row: int, held: NDArray[np.float64]) -> None:
            used[begin : begin + len(held)] += held
            running[begin : begin + len(held)] += 1
            starts[row] = begin * self._slot
            self.num_placed += 1

        num_longest = int((output >= share * output.max(initial=0)).sum())
        spread = ((np.arange(num_longest) + 0.5) * _GOLDEN % 1.0) ** power
        begins = (spread * (self._num_steps - output[:num_longest]) / self._slot).astype(np.int64)
        for row, begin in zip(self._others[:num_longest].tolist(), begins.tolist(), strict=True):
            begin_at(begin, row, self._held(row))
        if used.max() > self._room or running.max() > self._most_running:
            return None
        for row in self._others[num_longest:].tolist():
            held = self._held(row)
            last = int(self._num_steps - self._lengths.output_tokens[row]) // self._slot
            beside = sliding_window_view(used, len(held))[: last + 1] + held
            others = sliding_window_view(running, len(held))[: last + 1]
            fits = (beside.max(axis=1) <= self._room) & (others.max(axis=1) < self._most_running)
            begin = int(fits.argmax())
            if not fits[begin]:
                return None
            begin_at(begin, row, held)
        used -= self._used
        return Timetable(starts, self._is_flexible, self._num_steps, used, self._slot, self._lengths)

    def _held(self, row: int) -> NDArray[np.float64]:
        """What a request holds at the end of each slot of its life."""
        num_slots = max(-(-int(self._lengths.output_tokens[row]) // self._slot), 1)
        return int(self._lengths.prompt_tokens[row]) + self._unfilled + self._slot * np.arange(1.0, num_slots + 1)
