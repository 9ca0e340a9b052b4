"""Which end of a density-sorted shard to admit from next, so that compute and memory stay balanced all the way.

Knows nothing of blocks, steps or prompts: a scheduler tells it how many KV cache tokens the requests from each front
hold and asks for the next request. NumPy only, because both the planner's simulator and the engine use it.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

# A shard's memory time is never taken to be less than this: a shard of one-token outputs reads no KV cache at all.
_MIN_MEMORY_SECONDS = 1e-12
# Requests of one output token need no memory by the formula, but their prompts do while they are prefilled; and one
# that outlives its estimate takes more than its share. In simulation 0.2 costs nothing to 2 % where lengths are known
# and saves 15 % against 0.05 where they are estimated.
_MIN_LEFT_SHARE = 0.2


class Front(str, Enum):
    """An end of the shard: left is compute-heavy (high density), right is memory-heavy."""

    LEFT = "left"
    RIGHT = "right"


class DualScanner:
    """Two fronts that walk towards each other over one shard; each position is taken exactly once.

    A position names a request for good: its place in the shard as it was planned. The order may be revised later.

    Let rho_L, rho_R be the unit densities at the two fronts and rho the density of all that remains. The left front's
    share of the KV cache is M_L / M = (rho - rho_R) / (rho_L - rho_R), so that M_L rho_L + M_R rho_R = M rho
    (paper, "dual scan"). The two equations have no non-negative solution when both ends lie on one side of rho; the
    share is therefore clamped to [0, 1], and where both ends are equally dense one front is enough. Every call is O(1).
    """

    __slots__ = (
        "_compute_remaining",
        "_compute_seconds",
        "_is_two_ended",
        "_left",
        "_memory_remaining",
        "_memory_seconds",
        "_order",
        "_right",
        "_unit_density",
    )

    def __init__(
        self,
        *,
        compute_seconds: NDArray[np.float64],
        memory_seconds: NDArray[np.float64],
        unit_density: NDArray[np.float64],
        is_two_ended: bool,
    ) -> None:
        """Arrays [num_requests] in shard order, by falling unit density where `is_two_ended`.

        Raises ValueError when the arrays differ in shape or hold a negative or non-finite value.
        """
        arrays = {"compute_seconds": compute_seconds, "memory_seconds": memory_seconds, "unit_density": unit_density}
        for name, values in arrays.items():
            if values.ndim != 1 or values.shape != compute_seconds.shape:
                raise ValueError(f"Invalid shape of {name}: expected {compute_seconds.shape}, got {values.shape}.")
            if not bool(np.all(np.isfinite(values) & (values >= 0))):
                raise ValueError(f"Invalid {name}: expected finite values >= 0; plan the shard again.")
        self._is_two_ended = is_two_ended
        self._left = 0  # what remains is the half-open interval [left, right) of the order
        self._right = len(compute_seconds)
        self._order = np.arange(self._right)
        self.revise(self._order, compute_seconds, memory_seconds, unit_density)

    def revise(
        self,
        remaining: NDArray[np.int64],
        compute_seconds: NDArray[np.float64],
        memory_seconds: NDArray[np.float64],
        unit_density: NDArray[np.float64],
    ) -> None:
        """Go on in the order `remaining`, a permutation of what remains; costs [num_requests] are by position."""
        self._order[self._left : self._right] = remaining
        self._compute_seconds = compute_seconds
        self._memory_seconds = memory_seconds
        self._unit_density = unit_density
        self._compute_remaining = float(compute_seconds[remaining].sum())
        self._memory_remaining = float(memory_seconds[remaining].sum())

    def follow(self, order: NDArray[np.int64]) -> None:
        """Go on from one end, in `order`, a permutation of what remains."""
        self._order[self._left : self._right] = order
        self._is_two_ended = False

    def go_on_from_both_ends(self) -> None:
        """Go on with what remains in the order of the shard, after `follow`."""
        self._order[self._left : self._right].sort()
        self._is_two_ended = True

    @property
    def is_two_ended(self) -> bool:
        return self._is_two_ended

    @property
    def num_remaining(self) -> int:
        return self._right - self._left

    @property
    def remaining(self) -> NDArray[np.int64]:
        """[num_remaining]: the positions that haven't been taken, from the left front to the right one."""
        remaining: NDArray[np.int64] = self._order[self._left : self._right].copy()
        return remaining

    def ahead(self, front: Front, num_positions: int) -> list[int]:
        """The positions that will be taken next at `front`, at most `num_positions`."""
        ahead: list[int]
        if front is Front.LEFT:
            ahead = self._order[self._left : min(self._left + num_positions, self._right)].tolist()
        else:
            ahead = self._order[max(self._right - num_positions, self._left) : self._right][::-1].tolist()
        return ahead

    @property
    def compute_remaining(self) -> float:
        """Compute seconds of all that hasn't been taken."""
        return max(self._compute_remaining, 0.0)

    @property
    def memory_remaining(self) -> float:
        """Memory seconds of all that hasn't been taken, never quite zero."""
        return max(self._memory_remaining, _MIN_MEMORY_SECONDS)

    @property
    def density_remaining(self) -> float:
        """Compute over memory time of all that hasn't been taken: the root's density, over what remains."""
        return self.compute_remaining / self.memory_remaining

    @property
    def left_share(self) -> float:
        """Share of the KV cache, in [0, 1], that requests from the left front should hold now."""
        if not self._is_two_ended or self.num_remaining <= 1:
            return 1.0
        density_left = float(self._unit_density[self._order[self._left]])
        density_right = float(self._unit_density[self._order[self._right - 1]])
        if density_left == density_right:
            return 1.0
        density = self.density_remaining
        return min(max((density - density_right) / (density_left - density_right), 0.0), 1.0)

    def next_front(self, left_tokens: float, right_tokens: float, capacity_tokens: float) -> Front | None:
        """The front that is furthest under its share of `capacity_tokens`; None when nothing remains.

        `left_tokens` and `right_tokens` are the KV cache tokens that the admitted requests of each front hold.
        """
        if self.num_remaining == 0:
            return None
        if not self._is_two_ended:
            return Front.LEFT
        share = self.left_share
        missing_left = share * capacity_tokens - left_tokens
        missing_right = (1.0 - share) * capacity_tokens - right_tokens
        return Front.LEFT if missing_left >= missing_right else Front.RIGHT

    def max_held_tokens(self, front: Front, capacity_tokens: float) -> float:
        """The most KV cache tokens that requests of `front` may hold, counted at their full length.

        The left front may use all of the cache. The right one leaves the left its share, and never less than what
        prefilling takes: memory-heavy requests stay for long, so that once they fill the cache compute would starve.
        """
        if front is Front.LEFT or not self._is_two_ended:
            return capacity_tokens
        return (1.0 - max(self.left_share, _MIN_LEFT_SHARE)) * capacity_tokens

    def seconds_at(self, position: int) -> tuple[float, float]:
        """Compute and memory seconds of the request at a shard position."""
        return float(self._compute_seconds[position]), float(self._memory_seconds[position])

    def peek(self, front: Front) -> int:
        """The shard position at `front`, not taken. Raises IndexError when nothing remains."""
        if self.num_remaining == 0:
            raise IndexError("Nothing remains in this shard; ask next_front() first.")
        return int(self._order[self._left if front is Front.LEFT else self._right - 1])

    def take(self, front: Front) -> int:
        """The shard position at `front`, taken: it never comes again. Raises IndexError when nothing remains."""
        position = self.peek(front)
        if front is Front.LEFT:
            self._left += 1
        else:
            self._right -= 1
        self._compute_remaining -= float(self._compute_seconds[position])
        self._memory_remaining -= float(self._memory_seconds[position])
        return position
