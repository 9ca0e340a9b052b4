"""Log-probabilities of the chosen token and of the likeliest ones, from raw logits."""

from __future__ import annotations

import torch

from blendserve_kernels import reference
from blendserve_kernels.argument_checks import (
    check_dtype,
    check_inner_contiguous,
    check_rank,
    check_same_device,
    check_shape,
)

MAX_TOP = 20


def logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (chosen, top_ids, top): log softmax of the logits at the tokens chosen and at the num_top likeliest.

    logits: [num_rows, vocab_size] of any float dtype, before temperature and cuts. token_ids: int64 [num_rows].
    num_top: 0 to 20. chosen: float32 [num_rows]. top_ids: int64 [num_rows, num_top], likeliest first, equal ones in any
    order.
    top: float32 [num_rows, num_top]. A row that holds NaN gives NaN.
    """
    check_rank("logits", logits, "[num_rows, vocab_size]")
    check_inner_contiguous("logits", logits, 1)
    check_shape("token_ids", token_ids, [logits.shape[0]])
    check_dtype("token_ids", token_ids, torch.int64)
    check_same_device("logits", logits, token_ids=token_ids)
    if not 0 <= num_top <= min(MAX_TOP, logits.shape[1]):
        raise ValueError(f"Invalid num_top: expected 0 to {min(MAX_TOP, logits.shape[1])}, got {num_top}")
    if logits.is_cuda:
        from blendserve_kernels.triton_kernels.logprobs import logprobs_triton

        return logprobs_triton(logits, token_ids, num_top)
    return reference.logprobs(logits, token_ids, num_top)
