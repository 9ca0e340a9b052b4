"""Triton log-probabilities: the normaliser and the chosen token in one pass, one program per row."""

# Kernel parameters are typed by Triton, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 4096


@triton.jit
def _log_sum_exp_kernel(
    logits_ptr, token_ids_ptr, chosen_ptr, log_sum_exp_ptr, row_stride, vocab_size, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    # Every lane keeps its own maximum and sum until the end.
    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for begin in tl.range(0, vocab_size, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, logits, propagate_nan=tl.PropagateNan.ALL)
        safe_largest = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp(largest - safe_largest) + tl.exp(logits - safe_largest)
        largest = new_largest
    row_largest = tl.max(largest)
    total = tl.sum(total * tl.exp(largest - row_largest))
    log_sum_exp = row_largest + tl.log(total)
    token_id = tl.load(token_ids_ptr + row)
    tl.store(chosen_ptr + row, tl.load(row_ptr + token_id).to(tl.float32) - log_sum_exp)
    tl.store(log_sum_exp_ptr + row, log_sum_exp)


def logprobs_triton(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch `logprobs.logprobs`; arguments as there, unchecked. No host sync: safe to capture."""
    num_rows, vocab_size = logits.shape
    chosen = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    log_sum_exp = torch.empty_like(chosen)
    if num_rows:
        block = min(_BLOCK, int(triton.next_power_of_2(vocab_size)))
        _log_sum_exp_kernel[(num_rows,)](
            logits, token_ids, chosen, log_sum_exp, logits.stride(0), vocab_size, BLOCK=block, num_warps=8
        )
    top, top_ids = logits.topk(num_top, dim=-1)
    return chosen, top_ids, top.float() - log_sum_exp.unsqueeze(1)
