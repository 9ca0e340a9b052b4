"""The Triton rotary embedding with KV store against its twin."""

from __future__ import annotations

import pytest
import torch

from blendserve_kernels import reference
from blendserve_kernels.triton_kernels.rotary import rotary_and_store_kv_triton

TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(1, 9, 3, 64, 16), (63, 2, 1, 128, 64), (40, 7, 1, 64, 32), (5, 4, 4, 128, 128)],
)
def test_rotary_and_store_kv(
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    num_blocks = 2 * num_tokens // block_size + 2
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=device).to(dtype)
    q, k, v = (  # tokens apart, as slices of one projection
        part.unflatten(1, (-1, head_dim))
        for part in qkv.split([num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim], dim=1)
    )
    positions = torch.randint(0, 500, (num_tokens,), device=device)
    angles = torch.rand(500, head_dim // 2, device=device) * 6.28
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=-1)
    slots = torch.randperm(num_blocks * block_size)[:num_tokens].to(device)
    slots[::4] = -1
    caches = torch.full((4, num_blocks, num_kv_heads, block_size, head_dim), torch.nan, device=device).to(dtype)
    k_cache, v_cache, expected_k_cache, expected_v_cache = caches

    q_out = rotary_and_store_kv_triton(q, k, v, positions, cos_sin, k_cache, v_cache, slots)
    expected = reference.rotary_and_store_kv(q, k, v, positions, cos_sin, expected_k_cache, expected_v_cache, slots)

    close = {"atol": TOLERANCE[dtype], "rtol": 1e-2, "equal_nan": True}
    torch.testing.assert_close(q_out, expected, **close)
    torch.testing.assert_close(k_cache, expected_k_cache, **close)
    torch.testing.assert_close(v_cache, expected_v_cache, **close)
