"""The choice of the next token from a row of logits: greedy, or drawn after temperature, top-k, top-p and min-p.

A draw inverts the cumulative distribution over the kept tokens, in vocabulary order, at one uniform number that depends
on (seed, position) alone: the same request draws the same token whatever else is in its batch.
"""

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


def _check_logits(logits: torch.Tensor) -> None:
    check_rank("logits", logits, "[num_rows, vocab_size]")
    check_inner_contiguous("logits", logits, 1)


def greedy_checked(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (token_ids, is_finite): the first index of the largest logit of each row, and whether the row is sound.

    logits: [num_rows, vocab_size] of any float dtype, taken as it is. token_ids: int64 [num_rows], arbitrary but within
    the vocabulary where a row holds NaN. is_finite: bool [num_rows], False where a row holds NaN or an infinity.
    """
    _check_logits(logits)
    if logits.is_cuda:
        from blendserve_kernels.triton_kernels.sampling import greedy_triton

        return greedy_triton(logits)
    return reference.greedy(logits), reference.is_finite(logits)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Return the token ids of `greedy_checked` alone."""
    return greedy_checked(logits)[0]


def sample_checked(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (token_ids, is_finite), int64 and bool [num_rows] as `greedy_checked` does, one draw per row.

    logits: [num_rows, vocab_size] of any float dtype, taken as it is.
    temperature: float32 [num_rows], below 1e-5 = greedy. top_k: int32 [num_rows], 0 = off: keep the k largest.
    top_p: float32 [num_rows], 1 = off: of those keep the fewest largest whose probability reaches p.
    min_p: float32 [num_rows], 0 = off: of those keep the ones at least min_p times as likely as the likeliest.
    Ties with the last kept logit are kept.
    seeds, positions: int64 [num_rows]; position is the index of the token being generated.
    """
    _check_logits(logits)
    expected_dtypes = {
        "temperature": (temperature, torch.float32),
        "top_k": (top_k, torch.int32),
        "top_p": (top_p, torch.float32),
        "min_p": (min_p, torch.float32),
        "seeds": (seeds, torch.int64),
        "positions": (positions, torch.int64),
    }
    for name, (tensor, dtype) in expected_dtypes.items():
        check_shape(name, tensor, [logits.shape[0]])
        check_dtype(name, tensor, dtype)
        check_same_device("logits", logits, **{name: tensor})
    if logits.is_cuda:
        from blendserve_kernels.triton_kernels.sampling import sample_triton

        return sample_triton(logits, temperature, top_k, top_p, min_p, seeds, positions)
    token_ids = reference.sample(logits, temperature, top_k, top_p, min_p, seeds, positions)
    return token_ids, reference.is_finite(logits)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Return the token ids of `sample_checked` alone."""
    return sample_checked(logits, temperature, top_k, top_p, min_p, seeds, positions)[0]
