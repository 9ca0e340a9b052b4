"""Where in a timetable of given length each request begins, found by trial; why so: see `timetable`."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blendserve.known_lengths import KnownLengths

# A timetable is divided into about 256 slots, or into as many as let the longest request run through 96 of them, but
# into no more than 4,096.
_SLOTS: Final = 256
_SLOTS_OF_LONGEST: Final = 96
_MOST_SLOTS: Final = 4096
# Requests of nearly equal length begin together where there are more than so many, as long as each such unit needs no
# more than a share of the cache.
_UNITS: Final = 4096
_UNIT_SHARE: Final = 0.02
_LITTLE: Final = 100  # output tokens
_GOLDEN: Final = (5**0.5 - 1) / 2  # its multiples, modulo 1, are spread evenly however many there are


class _Unit(NamedTuple):
    """Requests that begin together. held: tokens at the beginning, of all. num_slots, output_tokens: of the longest."""

    num_requests: int
    held: int
    num_slots: int
    output_tokens: int


class Placed(NamedTuple):
    """starts: int64 [num_requests], by position, the step in which each begins. used: float64 [num_slots], KV cache
    tokens that those hold in each slot which aren't flexible.
    """

    starts: NDArray[np.int64]
    used: NDArray[np.float64]


class Packing:
    """A timetable of `num_steps` being made. is_flexible: bool [num_requests]. slot: steps.

    room_tokens and most_running bound what is held and how many run. unfilled_tokens: of each request's last block.
    """

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
        self._unfilled = unfilled_tokens
        longest = int(lengths.output_tokens.max(initial=0))
        self.slot = max(min(num_steps // _SLOTS, longest // _SLOTS_OF_LONGEST), num_steps // _MOST_SLOTS, 1)
        self._num_steps = num_steps
        self.is_flexible = lengths.is_shared | (lengths.output_tokens <= max(_LITTLE, 4 * self.slot))
        self._starts = np.zeros(len(self.is_flexible), dtype=np.int64)
        self._used = np.zeros(num_steps // self.slot + 2)
        self._running = np.zeros_like(self._used)
        self._ramp = self.slot * np.arange(1.0, len(self._used) + 1)  # what a request has generated, by its slots
        self._spread(np.flatnonzero(self.is_flexible)[::-1])
        others = np.flatnonzero(~self.is_flexible)
        self._others = others[np.argsort(-lengths.output_tokens[others], kind="stable")]
        self._units = self._make_units()
        self.num_placed = 0  # units in all trials

    @property
    def num_units(self) -> int:
        """What is to be placed."""
        return len(self._units)

    def place(self, share: float, power: float) -> Placed | None:
        """Place all that isn't flexible, the longest first, of which those within `share` of the longest begin at
        (n / N) ** `power` of their latest, and the others where they fit; None where one finds no room.
        """
        trial = _Trial(self._used.copy(), self._running.copy(), self._ramp, self._room, self._most_running)
        num_longest = sum(unit.output_tokens >= share * self._units[0].output_tokens for unit in self._units)
        spread = ((np.arange(num_longest) + 0.5) * _GOLDEN % 1.0) ** power
        for unit, part in zip(self._units, spread.tolist(), strict=False):
            trial.put(unit, int(part * (self._num_steps - unit.output_tokens) / self.slot))
        fits = not trial.is_too_full
        for unit in self._units[num_longest:]:
            fits = fits and trial.put_where_it_fits(unit, (self._num_steps - unit.output_tokens) // self.slot)
        self.num_placed += len(trial.begins)
        if not fits:
            return None
        starts = self._starts.copy()
        starts[self._others] = np.repeat(trial.begins, [unit.num_requests for unit in self._units]) * self.slot
        return Placed(starts, trial.used - self._used)

    def _spread(self, rows: NDArray[np.int64]) -> None:
        """Let `rows` begin in order, evenly by their tokens."""
        if len(rows) == 0:
            return
        output = self._lengths.output_tokens[rows]
        tokens = np.cumsum(self._lengths.computed_tokens[rows])
        share = (tokens - tokens[0]) / max(int(tokens[-1]), 1)
        starts = np.minimum(share * self._num_steps, np.maximum(self._num_steps - output, 0)).astype(np.int64)
        self._starts[rows] = starts = np.minimum.accumulate(starts[::-1])[::-1]  # none after the next one
        first, end = starts // self.slot, -(-(starts + output) // self.slot)
        # What is shared is held once. Of slots that a request runs through in part, it uses as much of each.
        own = self._lengths.prompt_tokens[rows] - self._lengths.shared_tokens[rows]
        part = np.minimum((output + 1) / ((end - first) * self.slot), 1.0)
        for total, values in ((self._used, part * (own + output + self._unfilled)), (self._running, part)):
            changes = np.bincount(first, values, len(total)) - np.bincount(end, values, len(total))
            total += np.cumsum(changes)

    def _make_units(self) -> list[_Unit]:
        """The longest first: each a request, or some of nearly equal length where there are very many."""
        if len(self._others) == 0:
            return []
        prompts, output = self._lengths.prompt_tokens[self._others], self._lengths.output_tokens[self._others]
        most = max(int(_UNIT_SHARE * self._room / float((prompts + output).mean())), 1)
        firsts = np.arange(0, len(prompts), min(-(-len(prompts) // _UNITS), most))
        counts = np.diff(np.append(firsts, len(prompts)))
        held = np.add.reduceat(prompts, firsts) + counts * self._unfilled
        num_slots = np.maximum(-(-output[firsts] // self.slot), 1)
        columns = (counts, held, num_slots, output[firsts])
        return [_Unit(*values) for values in zip(*(column.tolist() for column in columns), strict=True)]


class _Trial:
    """Units that are placed, and what they use in each slot. begins: their slots."""

    def __init__(
        self,
        used: NDArray[np.float64],
        running: NDArray[np.float64],
        ramp: NDArray[np.float64],
        room: float,
        most_running: float,
    ) -> None:
        self.used, self._running, self._ramp = used, running, ramp
        self._room, self._most_running = room, most_running
        self.begins: list[int] = []

    @property
    def is_too_full(self) -> bool:
        return bool(self.used.max() > self._room or self._running.max() > self._most_running)

    def put(self, unit: _Unit, begin: int) -> None:
        slots = slice(begin, begin + unit.num_slots)
        self.used[slots] += unit.held + unit.num_requests * self._ramp[: unit.num_slots]
        self._running[slots] += unit.num_requests
        self.begins.append(begin)

    def put_where_it_fits(self, unit: _Unit, last: int) -> bool:
        """Place a unit as early as it fits, no later than slot `last`; False where it doesn't."""
        within, count = slice(last + unit.num_slots), unit.num_requests
        # A unit grows by as much in each slot: with that added to all slots' use, only the most of its life matters.
        growth = count * self._ramp
        most = _sliding_max((self.used + growth)[within], unit.num_slots) - growth[: last + 1]
        fits = most + unit.held + growth[0] <= self._room
        if self._running.max() + count > self._most_running:
            fits &= _sliding_max(self._running[within], unit.num_slots) + count <= self._most_running
        begin = int(fits.argmax())
        if not fits[begin]:
            return False
        self.put(unit, begin)
        return True


def _sliding_max(values: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """The largest of each `length` neighbours, [len(values) - length + 1]."""
    width, largest = 1, values  # of each `width` neighbours
    while 2 * width <= length:
        largest = np.maximum(largest[:-width], largest[width:])
        width *= 2
    num_results = len(values) - length + 1
    return np.maximum(largest[:num_results], largest[length - width :][:num_results])
