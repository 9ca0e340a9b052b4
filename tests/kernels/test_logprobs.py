"""The log-probabilities against a log softmax in float64."""

from __future__ import annotations

import pytest
import torch

from blendserve_kernels.logprobs import logprobs
from blendserve_kernels.triton_kernels.logprobs import logprobs_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "num_top"), [(5000, 20), (63, 1), (700, 0)])
def test_logprobs(vocab_size: int, num_top: int, dtype: torch.dtype, device: torch.device) -> None:
    logits = (torch.randn(5, vocab_size + 3, device=device) * 9).to(dtype)[:, 3:]  # rows apart
    token_ids = torch.randint(vocab_size, (5,), device=device)
    expected = logits.double().log_softmax(dim=-1)
    for run in (logprobs, logprobs_triton):
        chosen, top_ids, top = run(logits, token_ids, num_top)
        torch.testing.assert_close(chosen.double(), expected.gather(1, token_ids[:, None])[:, 0], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(top.double(), expected.topk(num_top).values, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(top.double(), expected.gather(1, top_ids), atol=1e-4, rtol=1e-5)


def test_logprobs_of_forbidden_tokens_and_of_nan(device: torch.device) -> None:
    logits = torch.full((2, 5000), -torch.inf, device=device)
    logits[0, 4999] = 3.0
    logits[1, 17] = torch.nan
    for run in (logprobs, logprobs_triton):
        chosen, top_ids, top = run(logits, torch.tensor([4999, 0], device=device), 1)
        assert (chosen[0].item(), top_ids[0, 0].item(), top[0, 0].item()) == (0.0, 4999, 0.0)
        assert torch.isnan(chosen[1])


def test_logprobs_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"Invalid num_top: expected 0 to 20, got 21"):
        logprobs(torch.zeros(2, 50), torch.zeros(2, dtype=torch.int64), 21)
    with pytest.raises(TypeError, match=r"Invalid dtype of token_ids: expected torch\.int64, got torch\.int32"):
        logprobs(torch.zeros(2, 50), torch.zeros(2, dtype=torch.int32), 1)
