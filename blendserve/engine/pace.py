"""How fast either front is admitted beside running decodes, so that neither kind of work runs out before the other.

The rate is that of the planner's simulator. What a token and a read cost is learnt from the planned costs of the
requests that are admitted, so that nothing needs to be known of the device.
"""

from __future__ import annotations

import numpy as np

from blendserve.admission_rate import LEARNING_DENSITY, AdmissionRate, StepCosts, WorkAhead
from blendserve.dual_scanner import DualScanner
from blendserve.engine.request import Request
from blendserve.engine.running import RunningRequests
from blendserve.length_learning import LengthLearner

# What a step is taken to have room for where nothing has been admitted yet that says what a token costs.
_STEP_TOKENS = 512


class Pace:
    """Follows the admitted requests of one shard, and gives each step its share of either front's work."""

    def __init__(
        self, scanner: DualScanner, learner: LengthLearner | None, *, least_tokens: int, weights_tokens: int
    ) -> None:
        """least_tokens: shares beyond what costs nothing are saved up until they are as many, since fewer don't pay
        beside decodes.

        weights_tokens: of KV cache that take as long to read as the model's weights.
        """
        self._scanner = scanner
        self._learner = learner
        self._rate = AdmissionRate(scanner, None if learner is None else LEARNING_DENSITY)
        self._least_tokens = least_tokens
        self._weights_tokens = weights_tokens
        self._saved_tokens = 0
        self._compute_seconds = self._memory_seconds = 0.0  # of the requests so far
        self._tokens = self._kv_reads = 0.0  # what those seconds are for
        self._ahead = WorkAhead(0, 0, 0.0, 0.0, 0)

    def admit(self, request: Request, num_cached_tokens: int) -> None:
        """Take in what `request`, which has just been admitted, was planned to cost. num_cached_tokens: of its prompt,
        in the cache."""
        compute, memory = self._scanner.seconds_at(request.position)
        num_prompt, num_output = request.num_prompt_tokens, request.remaining_output_tokens
        self._compute_seconds += compute
        self._memory_seconds += memory
        self._tokens += num_prompt - num_cached_tokens + num_output
        self._kv_reads += num_prompt * num_output + num_output**2 / 2

    def begin_step(self, running: RunningRequests, num_decodes: int) -> int:
        """Look at what runs. Returns the prompts' tokens that this step may have beside its `num_decodes` decodes.

        Fewer than `least_tokens` only as far as they cost nothing, while the weights are read. No decodes, no limit.
        """
        costs = self._costs()
        self._ahead = self._work_ahead(running, costs)
        if num_decodes == 0:
            return 1 << 30
        if costs.token <= 0.0 or costs.kv_token <= 0.0:
            return max(_STEP_TOKENS - num_decodes, 0)
        prompt_token = self._prompt_token_seconds(costs)
        free_tokens = max(int(costs.weights / prompt_token) - num_decodes, 0)
        # Whichever is left more of mustn't idle: more products than the reads cover, or no more.
        is_compute_scarce = self._ahead.compute_seconds > self._ahead.memory_seconds
        token = prompt_token if is_compute_scarce else costs.token
        share = int(self._rate.prefill_seconds(costs, self._ahead) / token)
        self._saved_tokens += max(share, free_tokens)
        tokens = self._saved_tokens
        if tokens < self._least_tokens:
            tokens = min(tokens, free_tokens)
        self._saved_tokens -= tokens
        return tokens

    def lacks_memory_work(self, right_tokens: float, capacity_tokens: int) -> bool:
        """Whether steps lack the memory work of the next request at the right front, with which that front's requests
        will hold `right_tokens` on average over their lives."""
        return self._rate.lacks_memory_work(
            self._costs(), self._ahead, right_tokens=right_tokens, capacity_tokens=capacity_tokens
        )

    def _costs(self) -> StepCosts:
        token = self._compute_seconds / max(self._tokens, 1.0)
        if self._learner is not None:
            kv_token = self._learner.token_seconds[1]
        else:
            kv_token = self._memory_seconds / max(self._kv_reads, 1.0)
        return StepCosts(token, kv_token, weights=kv_token * self._weights_tokens)

    def _prompt_token_seconds(self, costs: StepCosts) -> float:
        """What a token of a prompt takes while the weights are read; on average, where the plan doesn't say it."""
        return costs.token if self._learner is None else self._learner.token_seconds[0]

    def _work_ahead(self, running: RunningRequests, costs: StepCosts) -> WorkAhead:
        rows = running.active_rows()
        context, remaining = running.num_tokens(rows), running.remaining_output_tokens(rows)
        kv_reads = float((context * remaining + remaining**2 / 2).sum())
        decoding = running.decoding_rows()
        return WorkAhead(
            num_decodes=len(decoding),
            context_tokens=int(running.context_tokens[decoding].sum()),
            compute_seconds=self._scanner.compute_remaining + costs.token * float(remaining.sum()),
            memory_seconds=self._scanner.memory_remaining + costs.kv_token * kv_reads,
            num_steps=int(np.max(remaining, initial=0)),
        )
