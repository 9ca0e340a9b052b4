"""How much an engine takes on at one time: what a job states, else what suits the device. The planner asks too."""

from __future__ import annotations

from dataclasses import dataclass

from blendserve.spec import EngineSpec


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """The sizes that a spec leaves to the device, and what its wish for determinism means there."""

    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    has_prefix_cache: bool = True
    is_batch_invariant: bool = False  # all products and reductions: a row doesn't depend on the others


def resolve_limits(engine: EngineSpec, *, is_gpu: bool) -> EngineLimits:
    """What `engine` states, else what suits the device: a GPU is filled by a thousand requests in large blocks.

    A GPU has kernels whose rows don't depend on one another. A CPU's libraries promise no such thing, so there a
    deterministic request runs alone and computes its whole prompt.
    """
    block_size, num_seqs, num_tokens = (128, 1024, 8192) if is_gpu else (16, 64, 512)
    runs_alone = engine.deterministic and not is_gpu
    return EngineLimits(
        block_size=engine.block_size or block_size,
        max_num_seqs=1 if runs_alone else engine.max_num_seqs or num_seqs,
        max_num_batched_tokens=num_tokens if runs_alone else engine.max_num_batched_tokens or num_tokens,
        has_prefix_cache=engine.prefix_cache and not runs_alone,
        is_batch_invariant=engine.deterministic and is_gpu,
    )
