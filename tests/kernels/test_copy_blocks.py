"""The Triton copy of KV cache blocks against its twin: to the token, and nothing else is touched."""

from __future__ import annotations

import pytest
import torch

from blendserve_kernels import reference
from blendserve_kernels.copy_blocks import copy_blocks
from blendserve_kernels.triton_kernels.copy_blocks import copy_blocks_triton


@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 64), (128, 128), (5, 24)])
def test_copy_blocks(block_size: int, head_dim: int, device: torch.device) -> None:
    blocks = torch.randn(3, 9, 2, block_size, head_dim, device=device).to(torch.bfloat16)
    blocks[:, 8] = float("nan")  # copied as it is
    sources = torch.tensor([0, 0, 8, 3], device=device)
    targets = torch.tensor([1, 2, 5, 7], device=device)
    num_tokens = torch.tensor([block_size, 1, 2, block_size - 1], device=device)
    expected = reference.copy_blocks(blocks.clone(), sources, targets, num_tokens)
    result = copy_blocks_triton(blocks, sources, targets, num_tokens)
    assert result.data_ptr() == blocks.data_ptr()
    torch.testing.assert_close(blocks, expected, atol=0, rtol=0, equal_nan=True)


def test_no_copies_are_none(device: torch.device) -> None:
    blocks = torch.randn(2, 2, 1, 4, 16, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert torch.equal(copy_blocks_triton(blocks.clone(), none, none, none), blocks)


def test_what_the_caller_got_wrong_is_named() -> None:
    blocks, index = torch.zeros(2, 2, 1, 4, 16), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_tokens"):
        copy_blocks(blocks, index, index, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="contiguous"):
        copy_blocks(blocks.transpose(3, 4), index, index, index)
