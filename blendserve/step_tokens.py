"""How many tokens a step had best compute.

Products come out even for some numbers of rows. On an H100 at its power limit, with 400 decodes of the 8B shape beside
prompts, a layer takes for each token 0.66 us in steps of 512 tokens, 0.62 of 1,024 and 0.66 of 2,048, decode attention
not counted, and below 512 as long as for 512. What waits is the same however it is cut into steps; in many small ones
decodes go on beside it. With few decodes that is worth less than reading the weights again for each step costs.
Measured on one GPU and one shape so far (benchmarks/throughput/NOTES.md).
"""

from __future__ import annotations

from typing import Final

STEP_TOKENS: Final = 1024
LEAST_STEP_TOKENS: Final = 512  # fewer take as long
PADDING: Final = 128  # a GPU's products work on as many rows at a time
# Below so many decodes, steps take what they can. With 32 to 192 the four traces depth-first take 99.1 to 106.2 s on a
# simulated H100, and 3,000 short prompts with 16 output tokens 42.6 to 44.8; with 0 up to 107.4 and 46.2.
FEW_DECODES: Final = 128


def padded_tokens(num_tokens: int) -> int:
    """What a step of `num_tokens` computes in the end, with its padding."""
    return -(-num_tokens // PADDING) * PADDING


def prefill_tokens(num_decodes: int, max_step_tokens: int) -> int:
    """How many tokens of prompts a step should have beside its decodes, of `max_step_tokens` at most in all."""
    best = max(STEP_TOKENS, padded_tokens(num_decodes + 1)) if num_decodes >= FEW_DECODES else max_step_tokens
    return max(min(best, max_step_tokens) - num_decodes, 0)
