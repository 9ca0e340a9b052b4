"""Triton sampling: one program per row of logits, thresholds by bisection instead of a sort, no host sync.

Top-k and top-p keep what is not less than some logit, found by bisection over the 32 bits of a float. Mostly that logit
is among a few thousand of the largest: two passes over the row find a cut and gather what lies above it, and all else
happens in registers. Where they don't reach (a flat distribution, a large k), each step is a pass over the row.
"""

# Kernel parameters are typed by Triton, constexprs are capitals by its custom.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803

from __future__ import annotations

import torch
import triton
import triton.language as tl

from blendserve_kernels.reference import MIN_TEMPERATURE

_BLOCK = 4096
_MAX_CANDIDATES = 4096
# How far below the largest logit the cuts lie, beyond which no candidates are gathered.
_CUTS = tl.constexpr((2.5, 5.0, 10.0, 20.0))
_KEY_OF_MINUS_INFINITY = tl.constexpr(-2139095041)
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)


@triton.jit
def _mix(x):
    """The finalizer of SplitMix64, as in the twin."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed, position):
    """Return the float32 in [0, 1) that belongs to (seed, position), both int64; bit for bit that of the twin."""
    golden_ratio = 0x9E3779B97F4A7C15
    bits = _mix(seed.to(tl.uint64, bitcast=True) + golden_ratio)
    bits = _mix(bits + (position + 1).to(tl.uint64, bitcast=True) * golden_ratio)
    return (bits >> 40).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def _key(x):
    """Map float32 to int32 so that the order stays."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scaled_block(row_ptr, begin, temperature, vocab_size, BLOCK: tl.constexpr):
    token = begin + tl.arange(0, BLOCK)
    logits = tl.load(row_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    return token, tl.math.div_rn(logits, temperature + tl.zeros([BLOCK], dtype=tl.float32))


@triton.jit
def _kept_mass(row_ptr, temperature, largest, key, vocab_size, IS_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Return how many logits are at or above the key (IS_COUNT), or their weight exp(logit - largest); float64."""
    mass = tl.zeros([BLOCK], dtype=tl.float64)
    for begin in tl.range(0, vocab_size, BLOCK):
        token, scaled = _scaled_block(row_ptr, begin, temperature, vocab_size, BLOCK)
        weight = tl.full([BLOCK], 1.0, dtype=tl.float32) if IS_COUNT else tl.exp(scaled - largest)
        weight = tl.where((_key(scaled) >= key) & (token < vocab_size), weight, 0.0)
        mass += weight.to(tl.float64)
    return tl.sum(mass)


@triton.jit
def _kept_weights(row_ptr, begin, temperature, largest, key, vocab_size, BLOCK: tl.constexpr):
    """Return a block's tokens, which of them are kept, and their weights in float64, 0 where not kept."""
    token, scaled = _scaled_block(row_ptr, begin, temperature, vocab_size, BLOCK)
    is_kept = (_key(scaled) >= key) & (token < vocab_size)
    return token, is_kept, tl.where(is_kept, tl.exp(scaled - largest), 0.0).to(tl.float64)


@triton.jit
def _draw(row_ptr, temperature, largest, key, uniform, vocab_size, BLOCK: tl.constexpr, PADDED_BLOCKS: tl.constexpr):
    """Return the first kept token at which the running sum passes the uniform number's share of the whole.

    One pass finds the block of the row that it lies in; only that block is summed token by token.
    """
    number = tl.arange(0, PADDED_BLOCKS)
    masses = tl.zeros([PADDED_BLOCKS], dtype=tl.float64)
    for begin in tl.range(0, vocab_size, BLOCK):
        _token, _is_kept, weights = _kept_weights(row_ptr, begin, temperature, largest, key, vocab_size, BLOCK)
        masses = tl.where(number == begin // BLOCK, tl.sum(weights), masses)
    target = uniform.to(tl.float64) * tl.sum(masses)
    block = tl.min(tl.where(tl.cumsum(masses) > target, number, PADDED_BLOCKS))
    block = tl.minimum(block, tl.max(tl.where(masses > 0.0, number, 0)))  # rounding may push the target up to the sum
    token, is_kept, weights = _kept_weights(row_ptr, block * BLOCK, temperature, largest, key, vocab_size, BLOCK)
    cumulative = tl.sum(tl.where(number < block, masses, 0.0)) + tl.cumsum(weights)
    drawn = tl.min(tl.where(is_kept & (cumulative > target), token, vocab_size))
    return tl.minimum(drawn, tl.max(tl.where(is_kept, token, 0)))


@triton.jit
def _bisect(
    row_ptr,
    temperature,
    largest,
    lowest_key,
    target,
    vocab_size,
    IS_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the largest key, at least lowest_key, at or above which lies a mass of `target`."""
    low = lowest_key.to(tl.int64)
    high = _key(largest).to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        mass = _kept_mass(row_ptr, temperature, largest, middle.to(tl.int32), vocab_size, IS_COUNT, BLOCK)
        is_enough = mass >= target
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def _largest(row_ptr, temperature, vocab_size, IS_SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """Return (largest logit, where it stands first, how many logits are NaN or infinite) of a row.

    Every lane keeps its own best until the end: one reduction a row.
    """
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    best_token = tl.zeros([BLOCK], dtype=tl.int32)
    num_unsound = tl.zeros([BLOCK], dtype=tl.int32)
    for begin in tl.range(0, vocab_size, BLOCK):
        if IS_SCALED:
            token, logits = _scaled_block(row_ptr, begin, temperature, vocab_size, BLOCK)
        else:
            token = begin + tl.arange(0, BLOCK)
            logits = tl.load(row_ptr + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        best_token = tl.where(logits > best, token, best_token)
        best = tl.maximum(best, logits)
        is_sound = (tl.abs(logits) < float("inf")) | (token >= vocab_size)
        num_unsound += tl.where(is_sound, 0, 1)
    largest = tl.max(best)
    return largest, tl.min(tl.where(best == largest, best_token, vocab_size - 1)), tl.sum(num_unsound)


@triton.jit
def _greedy_kernel(logits_ptr, out_ptr, is_finite_ptr, row_stride, vocab_size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    _value, token, num_unsound = _largest(row_ptr, 1.0, vocab_size, False, BLOCK)
    tl.store(out_ptr + row, token)
    tl.store(is_finite_ptr + row, num_unsound == 0)


@triton.jit
def _gather_candidates(
    row_ptr,
    temperature,
    largest,
    vocab_size,
    logits_ptr,
    tokens_ptr,
    BLOCK: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
):
    """Write the logits above the lowest cut that has room for them, and their tokens, in vocabulary order.

    Return (how many there are, weight exp(logit - largest) of the whole row in float64).
    """
    counts_0 = tl.zeros([BLOCK], dtype=tl.int32)
    counts_1 = tl.zeros([BLOCK], dtype=tl.int32)
    counts_2 = tl.zeros([BLOCK], dtype=tl.int32)
    counts_3 = tl.zeros([BLOCK], dtype=tl.int32)
    weights = tl.zeros([BLOCK], dtype=tl.float64)
    for begin in tl.range(0, vocab_size, BLOCK):
        token, scaled = _scaled_block(row_ptr, begin, temperature, vocab_size, BLOCK)
        distance = largest - scaled
        counts_0 += tl.where(distance <= _CUTS[0], 1, 0)
        counts_1 += tl.where(distance <= _CUTS[1], 1, 0)
        counts_2 += tl.where(distance <= _CUTS[2], 1, 0)
        counts_3 += tl.where(distance <= _CUTS[3], 1, 0)
        weights += tl.where(token < vocab_size, tl.exp(scaled - largest), 0.0).to(tl.float64)
    cut = -1.0  # no room above any cut: no candidates
    cut = tl.where(tl.sum(counts_0) <= MAX_CANDIDATES, _CUTS[0], cut)
    cut = tl.where(tl.sum(counts_1) <= MAX_CANDIDATES, _CUTS[1], cut)
    cut = tl.where(tl.sum(counts_2) <= MAX_CANDIDATES, _CUTS[2], cut)
    cut = tl.where(tl.sum(counts_3) <= MAX_CANDIDATES, _CUTS[3], cut)
    num_candidates = 0
    for begin in tl.range(0, vocab_size, BLOCK):
        token, scaled = _scaled_block(row_ptr, begin, temperature, vocab_size, BLOCK)
        is_candidate = (largest - scaled) <= cut
        num_here = tl.sum(is_candidate.to(tl.int32))
        if num_here > 0:
            place = num_candidates + tl.cumsum(is_candidate.to(tl.int32)) - 1
            tl.store(logits_ptr + place, scaled, mask=is_candidate)
            tl.store(tokens_ptr + place, token, mask=is_candidate)
        num_candidates += num_here
    tl.debug_barrier()  # the program reads them back
    return num_candidates, tl.sum(weights)


@triton.jit
def _bisect_candidates(keys, masses, low, high, target):
    """Return the largest key from low to high at or above which lies a mass of `target`, as `_bisect` does."""
    low = low.to(tl.int64)
    high = high.to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        is_enough = tl.sum(tl.where(keys >= middle, masses, 0.0)) >= target
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle - 1)
    return low.to(tl.int32)


@triton.jit
def _sample_among_candidates(logits, tokens, is_real, largest, total, has_k, top_k, top_p, min_p, uniform, vocab_size):
    """Return (token, whether the candidates reach as far as top-k and top-p do) for a row that wants one of them."""
    keys = tl.where(is_real, _key(logits), _KEY_OF_MINUS_INFINITY)
    weights = tl.where(is_real, tl.exp(logits - largest), 0.0).to(tl.float64)
    lowest = tl.min(tl.where(is_real, keys, _key(largest)))
    highest = _key(largest)
    key = lowest
    num_real = tl.sum(is_real.to(tl.int32))
    is_enough = num_real > 0
    if has_k:
        is_enough = num_real >= top_k
        key = _bisect_candidates(keys, is_real.to(tl.float64), key, highest, top_k.to(tl.float64))
        total = tl.sum(tl.where(keys >= key, weights, 0.0))
    if top_p < 1.0:
        target = top_p.to(tl.float64) * total
        is_enough = is_enough & (tl.sum(weights) >= target)
        key = _bisect_candidates(keys, weights, key, highest, target)
    if min_p > 0.0:
        key = tl.maximum(key, _key(largest + tl.log(min_p)))
    is_kept = is_real & (keys >= key)
    weights = tl.where(is_kept, weights, 0.0)
    target = uniform.to(tl.float64) * tl.sum(weights)
    drawn = tl.min(tl.where(is_kept & (tl.cumsum(weights) > target), tokens, vocab_size))
    return tl.minimum(drawn, tl.max(tl.where(is_kept, tokens, 0))), is_enough


@triton.jit
def _sample_kernel(
    logits_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    seeds_ptr,
    positions_ptr,
    out_ptr,
    is_finite_ptr,
    candidate_logits_ptr,
    candidate_tokens_ptr,
    row_stride,
    vocab_size,
    BLOCK: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,
    PADDED_BLOCKS: tl.constexpr,
):
    # 1. The largest logit and where it stands first.
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * row_stride
    temperature = tl.load(temperature_ptr + row)
    is_greedy = temperature < _MIN_TEMPERATURE
    temperature = tl.where(is_greedy, 1.0, temperature)
    largest, first_largest, num_unsound = _largest(row_ptr, temperature, vocab_size, True, BLOCK)
    tl.store(is_finite_ptr + row, num_unsound == 0)
    if is_greedy:
        tl.store(out_ptr + row, first_largest)
        return

    # 2. A row that wants the likeliest tokens only mostly finds them among a few thousand candidates.
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    has_k = (top_k > 0) & (top_k < vocab_size)
    uniform = _uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    key = tl.full([], _KEY_OF_MINUS_INFINITY, dtype=tl.int32)
    if has_k | (top_p < 1.0):
        number = tl.arange(0, MAX_CANDIDATES)
        logits_ptrs = candidate_logits_ptr + row.to(tl.int64) * MAX_CANDIDATES + number
        tokens_ptrs = candidate_tokens_ptr + row.to(tl.int64) * MAX_CANDIDATES + number
        num_candidates, total = _gather_candidates(
            row_ptr,
            temperature,
            largest,
            vocab_size,
            candidate_logits_ptr + row.to(tl.int64) * MAX_CANDIDATES,
            candidate_tokens_ptr + row.to(tl.int64) * MAX_CANDIDATES,
            BLOCK,
            MAX_CANDIDATES,
        )
        is_real = number < num_candidates
        token, is_enough = _sample_among_candidates(
            tl.load(logits_ptrs, mask=is_real, other=float("-inf")),
            tl.load(tokens_ptrs, mask=is_real, other=0),
            is_real,
            largest,
            total,
            has_k,
            top_k,
            top_p,
            min_p,
            uniform,
            vocab_size,
        )
        if is_enough:
            tl.store(out_ptr + row, token)
            return
        # 3. The others look for the smallest logit that is kept in the whole row.
        if has_k:
            key = _bisect(row_ptr, temperature, largest, key, top_k.to(tl.float64), vocab_size, True, BLOCK)
        if top_p < 1.0:
            if has_k:
                total = _kept_mass(row_ptr, temperature, largest, key, vocab_size, False, BLOCK)
            target = top_p.to(tl.float64) * total
            key = _bisect(row_ptr, temperature, largest, key, target, vocab_size, False, BLOCK)
    if min_p > 0.0:
        key = tl.maximum(key, _key(largest + tl.log(min_p)))

    token = _draw(row_ptr, temperature, largest, key, uniform, vocab_size, BLOCK, PADDED_BLOCKS)
    tl.store(out_ptr + row, token)


def _launch_shape(vocab_size: int) -> dict[str, int]:
    return {"BLOCK": min(_BLOCK, int(triton.next_power_of_2(vocab_size))), "num_warps": 8}


def _new_results(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_rows = logits.shape[0]
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    return token_ids, torch.empty(num_rows, dtype=torch.bool, device=logits.device)


def greedy_triton(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `sampling.greedy_checked`; arguments as there, unchecked. No host sync: safe to capture."""
    num_rows, vocab_size = logits.shape
    out, is_finite = _new_results(logits)
    if num_rows:
        _greedy_kernel[(num_rows,)](logits, out, is_finite, logits.stride(0), vocab_size, **_launch_shape(vocab_size))
    return out, is_finite


def sample_triton(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `sampling.sample_checked`; arguments as there, unchecked. No host sync: safe to capture."""
    num_rows, vocab_size = logits.shape
    out, is_finite = _new_results(logits)
    if num_rows == 0:
        return out, is_finite
    shape = _launch_shape(vocab_size)
    _sample_kernel[(num_rows,)](
        logits,
        temperature,
        top_k,
        top_p,
        min_p,
        seeds,
        positions,
        out,
        is_finite,
        torch.empty(num_rows, _MAX_CANDIDATES, dtype=torch.float32, device=logits.device),
        torch.empty(num_rows, _MAX_CANDIDATES, dtype=torch.int32, device=logits.device),
        logits.stride(0),
        vocab_size,
        MAX_CANDIDATES=_MAX_CANDIDATES,
        PADDED_BLOCKS=max(2, triton.next_power_of_2(triton.cdiv(vocab_size, shape["BLOCK"]))),
        **shape,
    )
    return out, is_finite
