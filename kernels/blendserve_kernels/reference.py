"""The twins of the Triton kernels in plain torch: what the kernels are tested against and what a CPU runs on.

Same signatures and results as the ops of the same names, less the argument checks. Written to be quick on few cores:
gathers stay small enough for the processor's cache, and the K and V of grouped heads are never copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)

# Gathered K or V of one sub-batch, in elements: about 4 MB in float32, so that it is read back from the cache.
_MAX_GATHERED_ELEMENTS = 1 << 20
# Sampling looks for its thresholds among this many largest logits before it sorts the whole vocabulary.
_NUM_CANDIDATES = 256
# Below this temperature the likeliest token is all but certain, and divided logits come close to infinity.
MIN_TEMPERATURE = 1e-5


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Twin of `rms_norm.rms_norm`."""
    x_float = x.float()
    normalized = x_float * torch.rsqrt(x_float.square().mean(dim=-1, keepdim=True) + eps)
    return weight * normalized.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of `rms_norm.add_rms_norm`."""
    residual_out = x + residual
    return rms_norm(residual_out, weight, eps), residual_out


def silu_and_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """Twin of `silu_and_multiply.silu_and_multiply`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def linear_silu_and_multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Twin of `linear_silu_and_multiply.linear_silu_and_multiply`."""
    gate, up = F.linear(x, weight).view(x.shape[0], -1, 2, 8).unbind(2)
    return F.silu(gate).mul_(up).flatten(1)


def copy_blocks(
    blocks: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor, num_tokens: torch.Tensor
) -> torch.Tensor:
    """Twin of `copy_blocks.copy_blocks`."""
    for source, target, length in zip(sources.tolist(), targets.tolist(), num_tokens.tolist(), strict=True):
        blocks[:, target, :, :length] = blocks[:, source, :, :length]
    return blocks


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, heads, D] by cos, sin float32 [T, 1, D / 2], in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rotary_and_store_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Twin of `rotary.rotary_and_store_kv`."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    is_stored = slot_mapping >= 0
    slots = slot_mapping[is_stored]
    block_size = k_cache.shape[2]
    blocks, offsets = slots // block_size, slots % block_size
    k_cache[blocks, :, offsets] = _rotate(k, cos, sin)[is_stored]
    v_cache[blocks, :, offsets] = v[is_stored]
    return _rotate(q, cos, sin)


def _gather_blocks(cache: torch.Tensor, block_table: torch.Tensor) -> torch.Tensor:
    """Return the blocks of n requests as [n, num_kv_heads, num_blocks * block_size, D] with a single copy."""
    num_cached_blocks, num_kv_heads, block_size, head_dim = cache.shape
    heads = torch.arange(num_kv_heads, device=cache.device)
    tiles = block_table.to(torch.int64).unsqueeze(1) * num_kv_heads + heads.unsqueeze(1)
    gathered = cache.view(num_cached_blocks * num_kv_heads, block_size * head_dim).index_select(0, tiles.flatten())
    return gathered.view(block_table.shape[0], num_kv_heads, -1, head_dim)


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Twin of `prefill_attention.prefill_attention`; loops over the requests."""
    if out is None:
        out = torch.zeros_like(q)
    block_size = k_cache.shape[2]
    starts = cu_seqlens_q.tolist()
    for request, context_len in enumerate(context_lens.tolist()):
        start, end = starts[request], starts[request + 1]
        if start == end:
            continue
        blocks = block_table[request : request + 1, : -(-context_len // block_size)]
        k = _gather_blocks(k_cache, blocks)[0, :, :context_len]  # [num_kv_heads, context_len, D]
        v = _gather_blocks(v_cache, blocks)[0, :, :context_len]
        out[start:end] = _causal_attention(q[start:end], k, v, scale)
    return out


def _causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of q [L, num_heads, D], the last L positions, over k, v [num_kv_heads, S, D]."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads, num_keys, _ = k.shape
    # KV heads as the batch, the query heads of a group as the heads: K and V are broadcast with stride 0, not copied.
    grouped_q = q.reshape(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    group_size = grouped_q.shape[1]
    is_visible = None
    if num_queries != num_keys and num_queries > 1:
        is_visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - num_queries)
    out = F.scaled_dot_product_attention(
        grouped_q,
        k.unsqueeze(1).expand(-1, group_size, -1, -1),
        v.unsqueeze(1).expand(-1, group_size, -1, -1),
        attn_mask=is_visible,
        is_causal=num_queries == num_keys and num_queries > 1,
        scale=scale,
    )
    return out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Twin of `decode_attention.decode_attention`; works through sub-batches of similar context length."""
    num_kv_heads, block_size, head_dim = k_cache.shape[1:]
    out = torch.zeros_like(q) if out is None else out.zero_()
    lengths = context_lens.tolist()
    longest_first = sorted((b for b in range(len(lengths)) if lengths[b] > 0), key=lambda b: -lengths[b])
    while longest_first:
        longest = lengths[longest_first[0]]
        num_blocks = -(-longest // block_size)
        max_rows = max(1, _MAX_GATHERED_ELEMENTS // (num_blocks * block_size * num_kv_heads * head_dim))
        rows = [b for b in longest_first[:max_rows] if lengths[b] * 4 >= longest * 3 - block_size]
        longest_first = longest_first[len(rows) :]
        index = torch.tensor(rows, device=q.device)
        out[index] = _decode_padded(
            q[index], k_cache, v_cache, block_table[index, :num_blocks], [lengths[b] for b in rows], scale
        )
    return out


def _decode_padded(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    lengths: list[int],
    scale: float,
) -> torch.Tensor:
    """Attention of q [n, num_heads, D] over n contexts padded to the longest one."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    device_lengths = torch.tensor(lengths, device=q.device).unsqueeze(1)
    # Padding entries of the table may name no block at all: read the request's first block there instead.
    columns = torch.arange(block_table.shape[1], device=q.device)
    block_table = torch.where(columns * block_size < device_lengths, block_table, block_table[:, :1])
    k = _gather_blocks(k_cache, block_table)  # [n, num_kv_heads, S, D]
    v = _gather_blocks(v_cache, block_table)
    for row, length in enumerate(lengths):
        v[row, :, length:] = 0  # stale values times a probability of 0 would still pass a NaN on
    is_padding = torch.arange(k.shape[2], device=q.device) >= device_lengths
    scores = (q.view(num_rows, num_kv_heads, -1, head_dim) * scale) @ k.transpose(-1, -2)
    scores.masked_fill_(is_padding.view(num_rows, 1, 1, -1), float("-inf"))
    probabilities = scores.float().softmax(dim=-1).to(v.dtype)
    return (probabilities @ v).view(num_rows, num_heads, head_dim)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Twin of `sampling.greedy`."""
    return logits.argmax(dim=-1)


def is_finite(logits: torch.Tensor) -> torch.Tensor:
    """Twin of the second result of `sampling.greedy_checked` and `sampling.sample_checked`."""
    return torch.isfinite(logits).all(dim=-1)


def logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Twin of `logprobs.logprobs`."""
    logits = logits.float()
    log_sum_exp = logits.logsumexp(dim=-1)
    top, top_ids = logits.topk(num_top, dim=-1)
    chosen = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1) - log_sum_exp
    return chosen, top_ids, top - log_sum_exp.unsqueeze(1)


def _as_int64(value: int) -> int:
    """Read 64 bits as a signed number."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 right without copies of the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits that scatters neighbours."""
    x = (x ^ _shift_right(x, 30)) * _as_int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _as_int64(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Return one float32 in [0, 1) per (seed, position), both int64, from a counter-based hash; 24 bits each."""
    golden_ratio = _as_int64(0x9E3779B97F4A7C15)
    bits = _mix(_mix(seeds + golden_ratio) + (positions + 1) * golden_ratio)
    return _shift_right(bits, 40).to(torch.float32) * 2.0**-24


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Twin of `sampling.sample`."""
    token_ids = greedy(logits)
    rows = (temperature >= MIN_TEMPERATURE).nonzero().squeeze(1)
    if rows.numel() == 0:
        return token_ids
    scaled = logits[rows].float() / temperature[rows].unsqueeze(1)
    threshold = _kept_threshold(scaled, top_k[rows], top_p[rows], min_p[rows])
    largest = scaled.amax(dim=-1, keepdim=True)
    weights = (scaled - largest).exp_().masked_fill_(scaled < threshold.unsqueeze(1), 0.0)
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    target = uniform(seeds[rows], positions[rows]).double().unsqueeze(1) * total
    drawn = torch.searchsorted(cumulative, target, right=True)
    last_kept = torch.searchsorted(cumulative, total)  # rounding may push the target up to the total
    token_ids[rows] = torch.minimum(drawn, last_kept).squeeze(1).clamp_(max=logits.shape[1] - 1)
    return token_ids


def _kept_threshold(
    scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Return the smallest logit [n] that top-k, then top-p, then min-p keep, for scaled logits [n, vocab_size]."""
    vocab_size = scaled.shape[1]
    threshold = torch.full_like(top_p, float("-inf"))
    is_limited = ((top_k > 0) & (top_k < vocab_size)) | (top_p < 1)
    rows = is_limited.nonzero().squeeze(1)
    num_candidates = min(_NUM_CANDIDATES, vocab_size)
    while rows.numel():
        candidates = scaled[rows].topk(num_candidates, dim=-1).values
        total = (scaled[rows] - candidates[:, :1]).exp_().sum(dim=-1, dtype=torch.float64)
        found, is_found = _threshold_among(candidates, total, top_k[rows], top_p[rows], vocab_size)
        threshold[rows[is_found]] = found[is_found]
        rows = rows[~is_found]
        num_candidates = vocab_size
    # log(0) = -inf keeps everything.
    return torch.maximum(threshold, scaled.amax(dim=-1) + min_p.log())


def _threshold_among(
    candidates: torch.Tensor, total: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the last logit that top-k and top-p keep among the m largest ones, [n, m] in falling order.

    `total` is the weight exp(logit - largest) of the whole row. Returns the thresholds, and which of them are final:
    for the others the m candidates don't reach far enough.
    """
    num_candidates = candidates.shape[1]
    k = torch.where((top_k > 0) & (top_k < vocab_size), top_k, vocab_size).to(torch.int64)
    has_k = k <= num_candidates
    kth = candidates.gather(1, (k.clamp(max=num_candidates) - 1).unsqueeze(1))
    is_in_top_k = candidates >= kth
    weights = (candidates - candidates[:, :1]).exp_()
    cumulative = weights.masked_fill(~is_in_top_k, 0.0).cumsum(dim=-1, dtype=torch.float64)
    # With top-k the ties beyond the candidates are cut off; that needs num_candidates equal logits.
    kept_total = torch.where(has_k, cumulative[:, -1], total)
    target = (top_p.double() * kept_total).unsqueeze(1)
    num_kept = ((cumulative < target) & is_in_top_k).sum(dim=-1) + 1
    num_kept = torch.where(top_p < 1, num_kept, is_in_top_k.sum(dim=-1)).clamp_(max=num_candidates)
    threshold = candidates.gather(1, (num_kept - 1).unsqueeze(1)).squeeze(1)
    is_final = has_k | ((top_p < 1) & (cumulative[:, -1] >= target.squeeze(1))) | (num_candidates == vocab_size)
    return threshold, is_final
