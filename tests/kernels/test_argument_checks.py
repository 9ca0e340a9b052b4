"""Every op names the argument that it can't run on, what it expected and what it got."""

from __future__ import annotations

import pytest
import torch

from blendserve_kernels.decode_attention import decode_attention
from blendserve_kernels.prefill_attention import prefill_attention
from blendserve_kernels.rms_norm import add_rms_norm, rms_norm
from blendserve_kernels.rotary import rotary_and_store_kv
from blendserve_kernels.sampling import greedy, sample
from blendserve_kernels.shared_prefix_attention import shared_prefix_decode_attention
from blendserve_kernels.silu_and_multiply import silu_and_multiply

Q, CACHE = torch.zeros(3, 4, 16), torch.zeros(5, 2, 8, 16)
TABLE, LENS = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, dtype=torch.int32)


def test_rms_norm_refuses_a_weight_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"Invalid shape of weight: expected \[8\], got \[7\]"):
        rms_norm(torch.zeros(2, 8), torch.zeros(7), 1e-5)
    with pytest.raises(ValueError, match=r"Invalid shape of residual: expected \[2, 8\], got \[3, 8\]"):
        add_rms_norm(torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(8), 1e-5)


def test_rms_norm_refuses_columns_that_are_apart() -> None:
    with pytest.raises(ValueError, match="Invalid strides of x"):
        rms_norm(torch.zeros(8, 2).t(), torch.zeros(8), 1e-5)


def test_silu_and_multiply_refuses_odd_columns() -> None:
    with pytest.raises(ValueError, match=r"Invalid shape of gate_up: expected \[num_tokens, 2 \* intermediate\]"):
        silu_and_multiply(torch.zeros(2, 7))


def test_decode_attention_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"Invalid shape of q: .*num_kv_heads=2 heads, got \[3, 3, 16\]"):
        decode_attention(torch.zeros(3, 3, 16), CACHE, CACHE, TABLE, LENS, 1.0)
    with pytest.raises(ValueError, match=r"Invalid shape of k_cache: expected \[5, 2, 8, 16\], got \[5, 2, 8, 32\]"):
        decode_attention(Q, torch.zeros(5, 2, 8, 32), torch.zeros(5, 2, 8, 32), TABLE, LENS, 1.0)
    with pytest.raises(ValueError, match=r"Invalid shape of context_lens: expected \[3\], got \[2\]"):
        decode_attention(Q, CACHE, CACHE, TABLE, LENS[:2], 1.0)
    with pytest.raises(TypeError, match=r"Invalid dtype of block_table: expected torch\.int32, got torch\.int64"):
        decode_attention(Q, CACHE, CACHE, TABLE.long(), LENS, 1.0)
    with pytest.raises(TypeError, match=r"Invalid dtype of k_cache: expected torch\.float16"):
        decode_attention(Q.half(), CACHE, CACHE, TABLE, LENS, 1.0)
    with pytest.raises(ValueError, match="Invalid device of block_table: expected cpu like q, got meta"):
        decode_attention(Q, CACHE, CACHE, TABLE.to("meta"), LENS, 1.0)
    with pytest.raises(ValueError, match=r"Invalid shape of out: expected \[3, 4, 16\], got \[4, 4, 16\]"):
        decode_attention(Q, CACHE, CACHE, TABLE, LENS, 1.0, out=torch.zeros(4, 4, 16))
    with pytest.raises(ValueError, match="Invalid strides of out"):
        decode_attention(Q, CACHE, CACHE, TABLE, LENS, 1.0, out=torch.zeros(3, 5, 16)[:, :4])


def test_prefill_attention_refuses_bounds_of_another_batch() -> None:
    with pytest.raises(ValueError, match=r"Invalid shape of cu_seqlens_q: expected \[4\], got \[3\]"):
        prefill_attention(Q, CACHE, CACHE, TABLE, LENS, LENS, 1.0, 1)


def test_shared_prefix_decode_attention_refuses_groups_of_two_lengths() -> None:
    with pytest.raises(ValueError, match=r"Invalid shape of group_sizes: expected \[3\], got \[2\]"):
        shared_prefix_decode_attention(Q, CACHE, CACHE, TABLE, LENS, LENS, LENS, LENS[:2], 1.0)


def test_rotary_and_store_kv_refuses_what_does_not_fit() -> None:
    k, positions, cos_sin = torch.zeros(3, 2, 16), torch.zeros(3, dtype=torch.int64), torch.zeros(9, 16)
    with pytest.raises(ValueError, match=r"Invalid shape of cos_sin: expected \[9, 16\], got \[9, 8\]"):
        rotary_and_store_kv(Q, k, k, positions, cos_sin[:, :8], CACHE, CACHE, positions)
    with pytest.raises(TypeError, match=r"Invalid dtype of slot_mapping: expected torch\.int64"):
        rotary_and_store_kv(Q, k, k, positions, cos_sin, CACHE, CACHE, positions.int())
    with pytest.raises(ValueError, match=r"Invalid shape of k: expected \[3, 2, 16\], got \[2, 2, 16\]"):
        rotary_and_store_kv(Q, k[:2], k, positions, cos_sin, CACHE, CACHE, positions)


def test_sampling_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"Invalid shape of logits: expected \[num_rows, vocab_size\], got \[4\]"):
        greedy(torch.zeros(4))
    floats, ints = torch.ones(2), torch.ones(2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"Invalid dtype of top_k: expected torch\.int32, got torch\.int64"):
        sample(torch.zeros(2, 9), floats, ints, floats, floats, ints, ints)
    with pytest.raises(ValueError, match=r"Invalid shape of seeds: expected \[2\], got \[1\]"):
        sample(torch.zeros(2, 9), floats, ints.int(), floats, floats, ints[:1], ints)
