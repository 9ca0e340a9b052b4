"""When each request of a shard should begin so that all steps compute alike and the KV cache is full throughout.

For shards whose output lengths are known, and engines that compute and read memory one after the other: what a run
takes then depends on how many steps it has, and that on how full the cache is. Admitted greedily, long requests start
together, fill the cache as they grow and end together, and what waited for them runs in a cache that is half empty.
And prompts that come first leave steps to the longest outputs that read the weights for little else.

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
from numpy.typing import NDArray

from blendserve.known_lengths import KnownLengths
from blendserve.step_tokens import LEAST_STEP_TOKENS, PADDING, STEP_TOKENS
from blendserve.timetable_packing import Packing

_MOST_PLACED: Final = 200_000  # units in all trials together, which take 5 to 25 us each
_ROOM: Final = 0.92  # share of the cache, and of the rows, that is planned with: requests begin a few steps late
_FILLED: Final = 0.6  # of the cache during the longest request's life, below which there is room enough
_STRETCH: Final = 1.03  # by which a timetable becomes longer where requests don't fit
_MOST_STRETCH: Final = 3.0
_UNDERUSED: Final = 0.4  # share of the planned use below which requests begin before their time
# The longest requests are those within a share of the longest; the n-th of N begins at (n / N) ** power of its latest.
_LATE: Final = ((1.0, 0.3), (1.0, 0.4), (1.0, 0.5), (1.0, 0.7), (0.9, 0.5), (0.9, 0.7), (0.75, 0.5), (0.75, 0.7))
_EVENLY: Final = ((1.0, 1.0), (0.75, 1.0), (0.5, 1.0))  # for far more requests than run at one time, much alike
_LONGEST: Final = _LATE + _EVENLY


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
    least_step_tokens: int = 0,
) -> Timetable | None:
    """The shortest timetable that is found; None where it is of no use: the cache has room and steps are full
    anyway, or there is too much.

    max_num_seqs: requests that can run at one time. max_step_tokens: what a step can compute. least_step_tokens: what
    steps have to compute on average for a timetable to be of use.
    """
    room, most_running = _ROOM * capacity_tokens, _ROOM * max_num_seqs
    longest = int(lengths.output_tokens.max(initial=0))
    largest = int((lengths.prompt_tokens + lengths.output_tokens).max(initial=0))
    held = float((lengths.prompt_tokens * lengths.output_tokens + lengths.output_tokens**2 / 2).sum())
    step_tokens = min(STEP_TOKENS, max_step_tokens)
    by_memory = max(float(longest), held / room, float(lengths.output_tokens.sum()) / most_running)
    num_tokens = int(lengths.computed_tokens.sum())
    is_full = held > _FILLED * longest * room
    is_long = by_memory == longest and num_tokens <= longest * step_tokens
    if largest > room or not (is_full or is_long):
        return None
    most_steps = num_tokens / least_step_tokens if least_step_tokens else math.inf

    def shortest(num_tokens: int, most_steps: float) -> Timetable | None:
        """In which steps compute `num_tokens` evenly, and which has no more than `most_steps`."""
        least = max(by_memory, num_tokens / step_tokens)
        num_steps, num_placed = least, 0
        while num_steps <= min(_MOST_STRETCH * least, most_steps) and num_placed <= _MOST_PLACED:
            packing = Packing(lengths, int(num_steps), room, most_running, unfilled_tokens=block_size // 2)
            if packing.num_units == 0:
                return None
            for share, power in _LONGEST:
                placed = packing.place(share, power)
                if placed is not None:
                    return Timetable(
                        placed.starts, packing.is_flexible, int(num_steps), placed.used, packing.slot, lengths
                    )
            num_placed += packing.num_placed
            num_steps *= _STRETCH
        return None

    table = shortest(num_tokens, most_steps)
    if table is None or num_tokens <= by_memory * step_tokens:
        return table
    # The prompts of what begins at once make the first steps longer: there is less for all others.
    begins_at_once = ~table.is_flexible & (table.starts == 0)
    at_once = int((lengths.prompt_tokens - lengths.shared_tokens)[begins_at_once].sum())
    return shortest(num_tokens - at_once, table.num_steps - 1) or table
