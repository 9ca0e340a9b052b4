"""How fast the left front's prompts are prefilled beside running decodes: so that neither runs out before the other.

Where products and KV cache reads overlap, a run ends soonest when every step has both in the proportion that all the
remaining work has (paper, "dual scan", with the rate as the control and memory only as the cap). Nothing needs to be
known of the device: the requests' planned costs say what a token and a read cost.
"""

from __future__ import annotations

from blendserve.dual_scanner import DualScanner
from blendserve.engine.request import Request
from blendserve.engine.running import RunningRequests

# A step without enough decodes isn't kept small for their sake.
_LEAST_STEP_TOKENS = 512


class Pace:
    """Learns costs from the requests that are admitted, and gives each step its share of the left front's prefill."""

    def __init__(self, scanner: DualScanner, least_tokens: int) -> None:
        """least_tokens: shares are saved up until they are as many, since fewer don't pay beside decodes."""
        self._scanner = scanner
        self._least_tokens = least_tokens
        self._saved_tokens = 0
        self._compute_seconds = self._memory_seconds = 0.0  # of the requests so far
        self._tokens = self._kv_reads = 0.0  # what those seconds are for

    def admit(self, request: Request, num_cached_tokens: int) -> None:
        """Take in what `request`, which is about to be taken, was planned to cost."""
        compute, memory = self._scanner.seconds_at(request.position)
        num_prompt, num_output = request.num_prompt_tokens, request.remaining_output_tokens
        self._compute_seconds += compute
        self._memory_seconds += memory
        self._tokens += num_prompt - num_cached_tokens + num_output
        self._kv_reads += num_prompt * num_output + num_output**2 / 2

    def left_prefill_tokens(self, running: RunningRequests, num_decodes: int) -> int:
        """Prefill tokens that the left front may have in a step of `num_decodes` decodes, 0 or `least_tokens` and more.

        Without decodes there is no limit.
        """
        if num_decodes == 0:
            return 1 << 30
        self._saved_tokens += self._share(running, num_decodes)
        if self._saved_tokens < self._least_tokens:
            return 0
        tokens, self._saved_tokens = self._saved_tokens, 0
        return tokens

    def _share(self, running: RunningRequests, num_decodes: int) -> int:
        """The left front's prefill tokens for one step, by the proportion of what remains of both kinds of work."""
        rows = running.active_rows()
        context, remaining = running.num_tokens(rows), running.remaining_output_tokens(rows)
        kv_reads_left = float((context * remaining + remaining**2 / 2).sum())
        least = max(_LEAST_STEP_TOKENS - num_decodes, 0)
        if self._memory_seconds <= 0.0 or self._compute_seconds <= 0.0 or kv_reads_left == 0.0:
            return least
        seconds_per_read = self._memory_seconds / self._kv_reads
        seconds_per_token = self._compute_seconds / self._tokens
        compute_left = self._scanner.compute_remaining + seconds_per_token * float(remaining.sum())
        memory_left = self._scanner.memory_remaining + seconds_per_read * kv_reads_left
        step_seconds = seconds_per_read * float(running.context_tokens[running.decoding_rows()].sum())
        step_tokens = compute_left / memory_left * step_seconds / seconds_per_token
        return max(int(step_tokens) - num_decodes, least)
