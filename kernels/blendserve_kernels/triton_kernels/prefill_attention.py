"""Triton prefill attention over the paged cache: ragged chunks, the heads of a group packed into the query tile.

One program per KV head and block of query tokens. A query block of ROWS rows holds ROWS // GROUP_SIZE tokens with all
query heads of the KV head, so a K or V tile is read once for the group. Tiles that every row sees in full run without a
mask; only the last ones, on the diagonal or beyond the context, are masked.
"""

# Kernel parameters are typed by Triton, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803, N806

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from blendserve_kernels.triton_kernels.decode_attention import check_head_dim, device_limits, is_hopper


@triton.jit
def _attend_to_tiles(
    first_tile,
    end_tile,
    q,
    k_cache,
    v_cache,
    block_table_ptr,
    kv_head,
    num_kv_heads,
    row_positions,
    context_len,
    scale_log2e,
    accumulator,
    row_max,
    row_sum,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    IS_MASKED: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Add the tiles first_tile .. end_tile - 1 of a request to the running softmax of the query rows."""
    dims = tl.arange(0, HEAD_DIM)
    for tile in tl.range(first_tile, end_tile, num_stages=NUM_STAGES):
        kv_token = tile * TILE
        tokens = kv_token + tl.arange(0, TILE)
        is_token = tokens < context_len
        if USE_TMA:
            block = tl.load(block_table_ptr + kv_token // BLOCK_SIZE)
            cache_row = (block * num_kv_heads + kv_head) * BLOCK_SIZE + kv_token % BLOCK_SIZE
            k = k_cache.load([cache_row, 0])
            v = v_cache.load([cache_row, 0])
        else:
            blocks = tl.load(block_table_ptr + tokens // BLOCK_SIZE, mask=is_token, other=0).to(tl.int64)
            cache_rows = (blocks * num_kv_heads + kv_head) * BLOCK_SIZE + tokens % BLOCK_SIZE
            cache_offsets = cache_rows[:, None] * HEAD_DIM + dims[None, :]
            k = tl.load(k_cache + cache_offsets, mask=is_token[:, None], other=0.0)
            v = tl.load(v_cache + cache_offsets, mask=is_token[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if IS_MASKED:
            scores = tl.where(tokens[None, :] <= row_positions[:, None], scores, float("-inf"))
            v = tl.where(is_token[:, None], v, 0.0)  # what lies beyond the context may be NaN, and 0 * NaN is NaN
        # The scale is positive, so it may be applied after the maximum; the first tile holds a key for every row.
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2e)
        weights = tl.exp2(scores * scale_log2e - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(weights, axis=1)
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * decay[:, None], input_precision=PRECISION)
        row_max = new_max
    return accumulator, row_max, row_sum


@triton.jit
def _prefill_attention_kernel(
    q_ptr,
    k_cache,
    v_cache,
    block_table_ptr,
    cu_seqlens_q_ptr,
    context_lens_ptr,
    out_ptr,
    num_requests,
    num_kv_heads,
    num_query_blocks,
    q_stride,
    block_table_stride,
    scale_log2e,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED_REQUESTS: tl.constexpr,
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    BLOCK_TOKENS: tl.constexpr = ROWS // GROUP_SIZE
    # 1. Which request and which of its query blocks? Late blocks see the most keys, so they go first.
    query_block = num_query_blocks - 1 - tl.program_id(0) // num_kv_heads
    kv_head = tl.program_id(0) % num_kv_heads
    all_requests = tl.arange(0, PADDED_REQUESTS)
    first_start = tl.load(cu_seqlens_q_ptr)
    all_starts = tl.load(cu_seqlens_q_ptr + all_requests, mask=all_requests < num_requests, other=0) - first_start
    # At most one query block of a request is partial, so request b may begin at block start // BLOCK_TOKENS + b.
    is_begun = (all_starts // BLOCK_TOKENS + all_requests <= query_block) & (all_requests < num_requests)
    request = tl.sum(is_begun.to(tl.int32)) - 1
    q_begin = tl.load(cu_seqlens_q_ptr + request)
    q_len = tl.load(cu_seqlens_q_ptr + request + 1) - q_begin
    first_token = (query_block - ((q_begin - first_start) // BLOCK_TOKENS + request)) * BLOCK_TOKENS
    if first_token >= q_len:
        return
    context_len = tl.load(context_lens_ptr + request)

    # 2. The query rows: token by token, the heads of the group inside.
    row = tl.arange(0, ROWS)
    row_token = first_token + row // GROUP_SIZE
    is_row = (row < BLOCK_TOKENS * GROUP_SIZE) & (row_token < q_len)
    row_head = kv_head * GROUP_SIZE + row % GROUP_SIZE
    dims = tl.arange(0, HEAD_DIM)
    q_rows = (q_begin + row_token).to(tl.int64)
    q_offsets = q_rows * q_stride + row_head * HEAD_DIM
    q = tl.load(q_ptr + q_offsets[:, None] + dims[None, :], mask=is_row[:, None], other=0.0)
    # An exact halving, made up for by the scale: what is computed, not loaded, stays in registers, and the tensor
    # cores then fetch only the keys from shared memory, not the queries over and over.
    q = (q * 0.5).to(q_ptr.dtype.element_ty)
    scale_log2e *= 2.0
    row_positions = context_len - q_len + row_token

    # 3. First the tiles that all rows see in full, then the masked ones.
    first_position = context_len - q_len + first_token
    num_full_tiles = (first_position + 1) // TILE
    last_position = tl.minimum(first_position + BLOCK_TOKENS, context_len) - 1
    num_tiles = last_position // TILE + 1
    block_table_ptr += request.to(tl.int64) * block_table_stride
    accumulator = tl.zeros([ROWS, HEAD_DIM], dtype=tl.float32)
    row_max = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([ROWS], dtype=tl.float32)
    accumulator, row_max, row_sum = _attend_to_tiles(
        0,
        num_full_tiles,
        q,
        k_cache,
        v_cache,
        block_table_ptr,
        kv_head,
        num_kv_heads,
        row_positions,
        context_len,
        scale_log2e,
        accumulator,
        row_max,
        row_sum,
        HEAD_DIM,
        BLOCK_SIZE,
        TILE,
        False,
        USE_TMA,
        PRECISION,
        NUM_STAGES,
    )
    accumulator, row_max, row_sum = _attend_to_tiles(
        num_full_tiles,
        num_tiles,
        q,
        k_cache,
        v_cache,
        block_table_ptr,
        kv_head,
        num_kv_heads,
        row_positions,
        context_len,
        scale_log2e,
        accumulator,
        row_max,
        row_sum,
        HEAD_DIM,
        BLOCK_SIZE,
        TILE,
        True,
        USE_TMA,
        PRECISION,
        NUM_STAGES,
    )
    out = accumulator / row_sum[:, None]
    out_offsets = (q_rows * num_kv_heads * GROUP_SIZE + row_head) * HEAD_DIM
    tl.store(out_ptr + out_offsets[:, None] + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _num_longer_blocks(num_tiles, position, q_len, TOKENS: tl.constexpr, TILE: tl.constexpr):
    """Return how many query blocks of a request, or of a vector of them, see more than num_tiles tiles."""
    num_blocks = (q_len + TOKENS - 1) // TOKENS
    num_others = tl.minimum(tl.maximum(num_tiles * TILE - position, 0) // TOKENS, num_blocks)
    return tl.where(position + q_len > num_tiles * TILE, num_blocks - num_others, 0)


@triton.jit
def _plan_prefill_kernel(
    cu_seqlens_q_ptr,
    context_lens_ptr,
    list_length_ptr,
    list_ptr,
    num_requests,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_REQUESTS: tl.constexpr,
):
    """Find the query block of each program, count the blocks that see more keys, and list it behind those."""
    all_requests = tl.arange(0, PADDED_REQUESTS)
    is_real = all_requests < num_requests
    all_starts = tl.load(cu_seqlens_q_ptr + all_requests, mask=is_real, other=0)
    all_lens = tl.load(cu_seqlens_q_ptr + all_requests + 1, mask=is_real, other=0) - all_starts
    all_positions = tl.load(context_lens_ptr + all_requests, mask=is_real, other=0) - all_lens
    tl.store(list_length_ptr, tl.sum((all_lens + TOKENS - 1) // TOKENS), mask=tl.program_id(0) == 0)
    # At most one block of a request is partial, so request b may begin at program start // TOKENS + b.
    first_start = tl.load(cu_seqlens_q_ptr)
    all_begins = (all_starts - first_start) // TOKENS + all_requests
    request = tl.sum((is_real & (all_begins <= tl.program_id(0))).to(tl.int32)) - 1
    q_begin = tl.load(cu_seqlens_q_ptr + request)
    q_len = tl.load(cu_seqlens_q_ptr + request + 1) - q_begin
    context_len = tl.load(context_lens_ptr + request)
    block = tl.program_id(0) - ((q_begin - first_start) // TOKENS + request)
    num_tokens = tl.minimum(q_len - block * TOKENS, TOKENS)
    if num_tokens <= 0:
        return
    position = context_len - q_len + block * TOKENS
    num_tiles = (position + num_tokens - 1) // TILE + 1
    num_longer = _num_longer_blocks(num_tiles, all_positions, all_lens, TOKENS, TILE)
    num_as_long = _num_longer_blocks(num_tiles - 1, all_positions, all_lens, TOKENS, TILE) - num_longer
    place = tl.sum(num_longer) + tl.sum(tl.where(all_requests < request, num_as_long, 0))
    # Of the request itself, blocks as long stand in front of those that are longer.
    num_up_to = _num_longer_blocks(num_tiles - 1, context_len - q_len, q_len, TOKENS, TILE)
    place += block - ((q_len + TOKENS - 1) // TOKENS - num_up_to)
    words = list_ptr + place * 8
    tl.store(words, q_begin + block * TOKENS)
    tl.store(words + 1, num_tokens)
    tl.store(words + 2, position)
    tl.store(words + 3, num_tiles)
    tl.store(words + 4, request)
    tl.store(words + 5, context_len)
    tl.store(words + 6, 0)
    tl.store(words + 7, 0)


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Query blocks, longest first, made by `plan_prefill_triton`: valid for every layer of a step."""

    pack: int  # heads of a KV head's group that lie in one query block
    # int32 [max_blocks, 8]: first token, tokens, first position, tiles, request, context length, first tile, split
    block_list: torch.Tensor
    list_length: torch.Tensor  # int32 [1], on the device


PLANNED_ROWS, PLANNED_TILE = 128, 128  # those of gluon_kernels.prefill_attention


def plan_prefill_triton(
    k_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    num_tokens: int,
    num_heads: int,
) -> PrefillPlan:
    """List the query blocks of a step on the device; arguments as for `prefill_attention.plan_prefill`, unchecked."""
    group_size = num_heads // k_cache.shape[1]
    pack = group_size & -group_size
    tokens = PLANNED_ROWS // pack
    num_requests = context_lens.shape[0]
    max_blocks = num_tokens // tokens + num_requests
    block_list = torch.empty(max_blocks, 8, dtype=torch.int32, device=cu_seqlens_q.device)
    list_length = torch.empty(1, dtype=torch.int32, device=cu_seqlens_q.device)
    _plan_prefill_kernel[(max_blocks,)](
        cu_seqlens_q,
        context_lens,
        list_length,
        block_list,
        num_requests,
        TOKENS=tokens,
        TILE=PLANNED_TILE,
        PADDED_REQUESTS=max(16, triton.next_power_of_2(num_requests)),
        num_warps=4,
    )
    return PrefillPlan(pack, block_list, list_length)


def fits_hopper_kernel(num_heads: int, k_cache: torch.Tensor) -> bool:
    """Return whether `gluon_kernels.prefill_attention` runs on this GPU, with these heads and blocks."""
    num_blocks, num_kv_heads, block_size, head_dim = k_cache.shape
    group_size = num_heads // num_kv_heads
    return (
        is_hopper(k_cache.device)
        and k_cache.element_size() == 2
        and head_dim in (64, 128)
        and group_size & -group_size <= 16
        and block_size % PLANNED_TILE == 0
        and num_blocks * num_kv_heads * block_size < 2**31
    )


_SHORT_CHUNK_ROWS = 8192  # query rows per KV head


@dataclass(frozen=True, slots=True)
class PrefillShape:
    """How a launch tiles its work: chosen by `choose_prefill_shape`, or by a benchmark that tries others."""

    use_tma: bool
    rows: int  # query rows a program, heads of the group included
    tile: int  # keys a tile
    num_stages: int
    num_warps: int


def choose_prefill_shape(k_cache: torch.Tensor, num_heads: int, max_seqlen_q: int) -> PrefillShape:
    """Choose the tiles for a cache and the longest chunk.

    Long chunks take large tiles, one program an SM; short ones small tiles, so that two programs of an SM hide each
    other's beginning and end (measured on an H100, see benchmarks/kernels/NOTES.md).
    """
    _, shared_memory, has_tma = device_limits(k_cache.device)
    num_blocks, num_kv_heads, block_size, head_dim = k_cache.shape
    group_size = num_heads // num_kv_heads
    min_rows = int(triton.next_power_of_2(group_size))
    key_bytes = head_dim * k_cache.element_size()
    can_use_tma = has_tma and num_blocks * num_kv_heads * block_size < 2**31  # descriptors index rows with 32 bits
    if k_cache.element_size() == 2 and can_use_tma:
        shapes = [PrefillShape(True, max(64, min_rows), 64, num_stages, 4) for num_stages in (5, 3)]
        if max_seqlen_q * group_size > _SHORT_CHUNK_ROWS:
            shapes.insert(0, PrefillShape(True, max(128, min_rows), 128, 5, 8))
        for shape in shapes:
            tiles_in_flight = (shape.num_stages + 1) // 2
            needed = (shape.rows + 2 * shape.tile * tiles_in_flight) * key_bytes + 2048
            if block_size % shape.tile == 0 and needed <= shared_memory:
                return shape
    tile = max(16, min(64, 8192 // key_bytes))
    return PrefillShape(False, max(64, min_rows), tile, 2, 4)


def prefill_attention_triton(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    max_seqlen_q: int,
    shape: PrefillShape | None = None,
    plan: PrefillPlan | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch `prefill_attention.prefill_attention`; arguments as there, unchecked. No host sync: safe to capture."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_requests = block_table.shape[0]
    check_head_dim(head_dim)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0 or num_requests == 0:
        return out
    if shape is None and fits_hopper_kernel(num_heads, k_cache):
        from blendserve_kernels.gluon_kernels import prefill_attention

        plan = plan or plan_prefill_triton(k_cache, cu_seqlens_q, context_lens, num_tokens, num_heads)
        plan_fields = (plan.pack, plan.list_length, plan.block_list)
        num_programs = device_limits(q.device)[0]
        prefill_attention.launch(q, k_cache, v_cache, block_table, scale, *plan_fields, out, num_programs)
        return out
    shape = shape or choose_prefill_shape(k_cache, num_heads, max_seqlen_q)
    group_size = num_heads // num_kv_heads
    num_query_blocks = num_tokens // (shape.rows // group_size) + num_requests
    caches: list[object] = [k_cache, v_cache]
    if shape.use_tma:
        caches = [
            TensorDescriptor.from_tensor(c.view(-1, head_dim), [shape.tile, head_dim]) for c in (k_cache, v_cache)
        ]
    _prefill_attention_kernel[(num_query_blocks * num_kv_heads,)](
        q,
        *caches,
        block_table,
        cu_seqlens_q,
        context_lens,
        out,
        num_requests,
        num_kv_heads,
        num_query_blocks,
        q.stride(0),
        block_table.stride(0),
        scale / math.log(2),
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=shape.tile,
        ROWS=shape.rows,
        PADDED_REQUESTS=max(16, triton.next_power_of_2(num_requests)),
        USE_TMA=shape.use_tma,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        NUM_STAGES=shape.num_stages,
        num_warps=shape.num_warps,
    )
    return out
