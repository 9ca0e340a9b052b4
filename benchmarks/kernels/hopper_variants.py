"""Times what the attention kernels for Hopper leave to constants, each variant over the same shapes, as a short table.

    PYTHONPATH=kernels:. python benchmarks/kernels/hopper_variants.py [decode] [rotary] [prefill]

Every variant is compared with the torch twin first, on contexts that are ragged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import torch

from benchmarks.kernels.attention import FEW_PROGRAMS, SCALE, KVPool, decode_twin
from benchmarks.kernels.measuring import (
    BLOCK_SIZE,
    DTYPE,
    HEAD_DIM,
    HEADS,
    KV_BYTES_PER_TOKEN,
    KV_HEADS,
    check_close,
    copy_bytes_per_second,
    median_seconds,
)
from blendserve_kernels.decode_attention import decode_attention, plan_decode
from blendserve_kernels.gluon_kernels import decode_attention as kernel
from blendserve_kernels.prefill_attention import plan_prefill, prefill_attention
from blendserve_kernels.rotary import rotary_and_store_kv
from blendserve_kernels.triton_kernels import decode_attention as launcher

Constants = dict[tuple[ModuleType, str], object]

POOL_TOKENS = 1 << 20
CUT, EARLY = {(launcher, "KEEP_WHOLE"): False}, {(launcher, "BEGIN_EARLY"): True}
VARIANTS: dict[str, Constants] = {
    "as chosen": {},
    "again": {},
    "all items cut": CUT,
    "boxes of 8": {(kernel, "BOX"): 8},
    "boxes of 32": {(kernel, "BOX"): 32},
    "3 tiles in flight": {(kernel, "STAGES_OF_MANY"): 3},
    "2 tiles of few": {(kernel, "STAGES_OF_FEW"): 2},
    "early": EARLY,
    "early, boxes of 8": EARLY | {(kernel, "BOX"): 8},
    "early, all cut": EARLY | CUT,
    "early, 3 tiles": EARLY | {(kernel, "STAGES_OF_MANY"): 3},
}
# Requests, shortest and longest context, programs.
SHAPES = [
    (64, 512, 512, None),
    (64, 300, 700, None),
    (256, 512, 512, None),
    (256, 2048, 2048, None),
    (1000, 100, 300, None),
    (64, 512, 512, FEW_PROGRAMS),
    (256, 2048, 2048, FEW_PROGRAMS),
    (1000, 100, 300, FEW_PROGRAMS),
]


@contextmanager
def using(constants: Constants) -> Iterator[None]:
    """Set constants of modules for a while."""
    before = {(module, name): getattr(module, name) for module, name in constants}
    for (module, name), value in constants.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)


def _lens(num_requests: int, shortest: int, longest: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_requests + shortest)
    return torch.randint(shortest, longest + 1, (num_requests,), generator=generator, dtype=torch.int32).cuda()


def _queries(num_tokens: int, heads: int = HEADS) -> torch.Tensor:
    return torch.randn(num_tokens, heads, HEAD_DIM, device="cuda", dtype=DTYPE)


def _decodes(
    pool: KVPool, num_requests: int, shortest: int, longest: int, num_programs: int | None
) -> tuple[list[Callable[[], torch.Tensor]], torch.Tensor]:
    """Return a call for each part of the pool, and the context lengths."""
    lens, q = _lens(num_requests, shortest, longest), _queries(num_requests)
    calls = [
        partial(
            decode_attention,
            *(q, pool.k_cache, pool.v_cache, table, lens, SCALE),
            plan=plan_decode(pool.k_cache, table, lens, HEADS, num_programs),
        )
        for table in pool.parts(num_requests, longest)
    ]
    return calls, lens


def _check_decode(pool: KVPool, name: str) -> None:
    for num_programs in (None, FEW_PROGRAMS):
        for shortest, longest in ((1, 1000), (512, 512)):
            lens, q, table = _lens(64, shortest, longest), _queries(64), pool.parts(64, longest)[0]
            plan = plan_decode(pool.k_cache, table, lens, HEADS, num_programs)
            for _ in range(3):  # one behind the other, as layers are
                out = decode_attention(q, pool.k_cache, pool.v_cache, table, lens, SCALE, plan=plan)
            check_close(f"{name}: decode {shortest}-{longest}", out, decode_twin(pool, q, table, lens))


def compare_decode(pool: KVPool) -> None:
    """Print microseconds and share of the copy bandwidth of decode attention."""
    copy_rate = copy_bytes_per_second()
    print(f"decode, microseconds and share of a copy ({copy_rate / 1e12:.3f} TB/s)")
    heads = [f"{n}x{a if a == b else f'{a}-{b}'}{'@' + str(p) if p else ''}" for n, a, b, p in SHAPES]
    print(f"{'':18}", *(f"{head:>16}" for head in heads))
    for name, constants in VARIANTS.items():
        with using(constants):
            _check_decode(pool, name)
            cells = []
            for shape in SHAPES:
                calls, lens = _decodes(pool, *shape)
                seconds = median_seconds(calls, 9)
                share = int(lens.sum()) * KV_BYTES_PER_TOKEN / seconds / copy_rate
                cells.append(f"{seconds * 1e6:8.1f} {share:.3f}")
        print(f"{name:18}", *(f"{cell:>16}" for cell in cells), flush=True)


def compare_behind_rotary(pool: KVPool) -> None:
    """Print the time of rotary embedding with decode attention behind it, as in a layer."""
    for num_requests, context in ((64, 512), (256, 512)):
        q, k = _queries(num_requests), _queries(num_requests, KV_HEADS)
        positions = torch.full((num_requests,), context - 1, device="cuda")
        cos_sin = torch.randn(context, HEAD_DIM, device="cuda")
        lens = _lens(num_requests, context, context)

        caches = (pool.k_cache, pool.v_cache)

        def layer(
            table: torch.Tensor,
            slots: torch.Tensor,
            plan: launcher.DecodePlan | None,
            operands: tuple[torch.Tensor, ...] = (q, k, k, positions, cos_sin, *caches),
            lens: torch.Tensor = lens,
        ) -> None:
            rotated = rotary_and_store_kv(*operands, slots)
            decode_attention(rotated, *operands[-2:], table, lens, SCALE, plan=plan)

        for name, constants in (("waiting", {}), ("early", EARLY)):
            with using(constants):
                calls = [
                    partial(
                        layer,
                        table,
                        table[:, -1].long() * BLOCK_SIZE + BLOCK_SIZE - 1,
                        plan_decode(pool.k_cache, table, lens, HEADS),
                    )
                    for table in pool.parts(num_requests, context)
                ]
                seconds = median_seconds(calls, 9)
            print(f"rotary, then decode {num_requests} x {context}, {name}: {seconds * 1e6:.1f} us", flush=True)


def compare_prefill(pool: KVPool) -> None:
    """Print TFLOP/s of prefill attention."""
    for num_requests, num_tokens in ((1, 2048), (4, 2048), (1, 8192), (16, 512)):
        lens = torch.full((num_requests,), num_tokens, device="cuda", dtype=torch.int32)
        bounds = torch.arange(num_requests + 1, device="cuda", dtype=torch.int32) * num_tokens
        q = _queries(num_requests * num_tokens)
        plan = plan_prefill(pool.k_cache, bounds, lens, len(q), HEADS)
        calls = [
            partial(prefill_attention, q, pool.k_cache, pool.v_cache, table, bounds, lens, SCALE, num_tokens, plan=plan)
            for table in pool.parts(num_requests, num_tokens)[:8]
        ]
        seconds = median_seconds(calls, 9)
        operations = 4 * HEADS * HEAD_DIM * num_requests * num_tokens * (num_tokens + 1) / 2
        print(f"prefill {num_requests} x {num_tokens}: {operations / seconds / 1e12:.0f} TFLOP/s", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    kv_pool = KVPool(POOL_TOKENS)
    comparisons = {
        "decode": compare_decode,
        "rotary": compare_behind_rotary,
        "prefill": compare_prefill,
    }
    for wanted in sys.argv[1:] or comparisons:
        comparisons[wanted](kv_pool)
