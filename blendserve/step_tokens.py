"""How many tokens a step had best compute.

Products come out even for some numbers of rows: on an H100, with 400 decodes of the 8B shape beside prompts, a layer
takes for each token 0.66 us in steps of 512 tokens, 0.62 of 1,024, 0.66 of 2,048 and 0.70 of 8,192, decode attention
not counted, and below 512 as long as for 512. What waits to be computed is the same whatever steps it is cut into; in
many small ones decodes go on beside it, and the GPU draws as much power in one as in the next. Measured on one GPU and
one shape so far (benchmarks/throughput/NOTES.md).
"""

from __future__ import annotations

from typing import Final

STEP_TOKENS: Final = 1024
LEAST_STEP_TOKENS: Final = 512  # fewer take as long
PADDING: Final = 128  # a GPU's products work on as many rows at a time


def padded_tokens(num_tokens: int) -> int:
    """What a step of `num_tokens` computes in the end, with its padding."""
    return -(-num_tokens // PADDING) * PADDING
