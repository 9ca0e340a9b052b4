"""How much of either kind of work a step shall have: the rate at which each front of a shard is admitted.

Where products and KV cache reads overlap, a run ends soonest when every step has both in the proportion of all that is
left, and when the longest output doesn't end after the rest (paper, "dual scan", with the rate as the control and
memory only as the cap). The planner's simulator and the engine both admit by this, so that they can't differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from blendserve.dual_scanner import DualScanner, Front

READMITTED_SHARE: Final = 0.9  # of the cache: a preempted request that is back too early is preempted again
# Compute over memory time of a step while lengths are guesses: both in full use. That gets memory-heavy requests done
# as early as may be, so that one that turns out long doesn't end up alone.
LEARNING_DENSITY: Final = 1.0
# Memory-heavy requests are admitted until a step's memory time is twice that of reading the weights, and as long as
# that will hold on the average of their lives within three times. More of them only make each step, and so each long
# output, take longer: steps are then full of both kinds of work anyway.
_WANTED_STEPS = 2.0
_MOST_STEPS = 3.0


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds for a token's products, for reading a token of KV cache, and for reading all weights, the least that the
    products of a step take."""

    token: float
    kv_token: float
    weights: float


@dataclass(frozen=True, slots=True)
class WorkAhead:
    """What the next step would be without more requests, and what is left of all.

    context_tokens: KV cache tokens that its `num_decodes` decodes read. compute_seconds, memory_seconds: left of what
    runs and waits. num_steps: until the last one of those that run is expected to end.
    """

    num_decodes: int
    context_tokens: int
    compute_seconds: float
    memory_seconds: float
    num_steps: int


class AdmissionRate:
    """The rate of one shard's admission from both fronts."""

    __slots__ = ("_density", "_scanner")

    def __init__(self, scanner: DualScanner, density: float | None) -> None:
        """density: compute over memory time that each step aims at; None: that of all that is left."""
        self._scanner = scanner
        self._density = density

    def prefill_seconds(self, costs: StepCosts, ahead: WorkAhead) -> float:
        """Compute time of the prefill in this step: what the decodes' memory time leaves unused, 0 or less for none.

        Over the whole shard compute and memory time stand in the ratio of what remains of both; a step that keeps to it
        leaves neither idle, whatever the phases of the running requests are.
        """
        density = self._density
        if density is None:
            density = max(ahead.compute_seconds, 0.0) / max(ahead.memory_seconds, 1e-9)
        memory = ahead.context_tokens * costs.kv_token
        wanted = density * memory
        if ahead.compute_seconds > ahead.memory_seconds:
            # No more than lasts until the longest output ends, but for what fits beside the reads anyway.
            wanted = max(min(wanted, ahead.compute_seconds / max(ahead.num_steps, 1)), memory)
        return max(wanted, costs.weights) - ahead.num_decodes * costs.token

    def lacks_memory_work(
        self, costs: StepCosts, ahead: WorkAhead, *, right_tokens: float, capacity_tokens: float
    ) -> bool:
        """Whether steps lack the memory work of the next request at the right front; its share of memory is the cap.

        right_tokens: what the right front's requests hold on average over their lives, that request's included.
        """
        wanted = self._wanted_steps(costs, ahead) * costs.weights
        held_seconds = right_tokens * costs.kv_token
        is_enough = (
            ahead.context_tokens * costs.kv_token >= wanted or held_seconds > _MOST_STEPS / _WANTED_STEPS * wanted
        )
        if wanted > 0 and is_enough:
            return False
        return right_tokens <= self._scanner.max_held_tokens(Front.RIGHT, capacity_tokens)

    def _wanted_steps(self, costs: StepCosts, ahead: WorkAhead) -> float:
        """Memory time of a step, in times of reading the weights: less where the longest output would end after the
        rest."""
        if costs.weights <= 0:
            return 0.0
        step_seconds = max(ahead.compute_seconds, ahead.memory_seconds) / max(ahead.num_steps, 1)
        return min(max(step_seconds / costs.weights, 1.0), _WANTED_STEPS)
