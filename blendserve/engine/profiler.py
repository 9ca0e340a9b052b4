"""Measures what a step's parts take on this device: `python -m blendserve.engine.profiler MODEL_FOLDER`.

Steps of different make-up run as in a job, and non-negative fits share their times out among products, head, prefill
attention and decode attention. The planner reads the file that comes out instead of data-sheet figures.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import blendserve
from blendserve.engine.device import memory_bytes
from blendserve.engine.engine import LLMEngine
from blendserve.engine.model_runner import ModelRunner
from blendserve.engine.overlap import OverlapPolicy
from blendserve.engine.request import Request
from blendserve.engine.scheduled_batch import PrefillChunk, ScheduledBatch, TableChange
from blendserve.engine.step_mixes import DECODE_MIXES, PREFILL_MIXES, SIDE_BY_SIDE_MIXES, MixLimits, StepMix
from blendserve.errors import BlendServeError
from blendserve.hardware_profile import (
    PROFILES,
    AffineFit,
    HardwareProfile,
    ProfiledModel,
    SideBySide,
    write_profile,
)
from blendserve.spec import EngineSpec, SamplingSpec

# Steps before the one that counts: they compile kernels and capture the shape.
_WARM_UPS = 3
_REPETITIONS = 3
_LASTING_REPETITIONS = 12  # long enough for the clock to fall as far as the power limit wants it to
_PROGRAMS = (28, 36, 48)  # SMs for decode attention that are tried
_ALWAYS = 2.0  # a gain that pays
_FREE_TOKENS = range(0, 1025, 8)  # how many tokens may take no longer than one, as far as the fit looks
_LEAST_SECONDS = 1e-15  # of a unit of work that costs too little to be seen

log = logging.getLogger(__name__)


class StepTimer:
    """Runs made-up steps on an engine's runner. Their tokens mean nothing; only their times count."""

    def __init__(self, runner: ModelRunner, *, num_blocks: int, block_size: int) -> None:
        self._runner = runner
        self._num_blocks = num_blocks
        self._block_size = block_size

    def seconds(self, mix: StepMix, repetitions: int = _REPETITIONS) -> float:
        """The median time of such a step, of the last `_REPETITIONS` of so many."""
        batch = self._batch(mix)
        times = []
        for _ in range(_WARM_UPS + repetitions):
            started = time.perf_counter()
            output = self._runner.collect(self._runner.launch(batch))
            times.append(output.busy_seconds or time.perf_counter() - started)
        return float(np.median(times[-_REPETITIONS:]))

    def _batch(self, mix: StepMix) -> ScheduledBatch:
        rows = np.arange(mix.num_decodes + mix.num_chunks, dtype=np.int64)
        chunks = [self._chunk(int(row), mix.chunk_tokens) for row in rows[mix.num_decodes :]]
        lengths = [mix.context_tokens] * mix.num_decodes + [mix.chunk_tokens] * mix.num_chunks
        zeros = np.zeros(len(rows), dtype=np.int64)
        return ScheduledBatch(
            decode_rows=rows[: mix.num_decodes],
            decode_positions=np.full(mix.num_decodes, mix.context_tokens - 1, dtype=np.int64),
            prefills=chunks,
            sampled_rows=rows,
            sampled_serials=zeros,
            sampled_positions=zeros,
            sampled_seeds=zeros,
            table_changes=self._tables(lengths),
            num_prefill_tokens=mix.num_chunks * mix.chunk_tokens,
        )

    def _chunk(self, row: int, num_tokens: int) -> PrefillChunk:
        tokens = np.full(num_tokens, 1, dtype=np.int32)
        request = Request(
            position=row,
            row_index=row,
            request_id=str(row),
            prompt_token_ids=tokens,
            max_tokens=1,
            estimated_output_tokens=1,
        )
        return PrefillChunk(request, row, 0, num_tokens, is_last=True)

    def _tables(self, lengths: Sequence[int]) -> list[TableChange]:
        """Blocks of its own for every row, as far as there are enough."""
        changes, first = [], 0
        for row, length in enumerate(lengths):
            count = -(-length // self._block_size)
            changes.append(TableChange(row, 0, [block % self._num_blocks for block in range(first, first + count)]))
            first += count
        return changes


def fit(features: NDArray[np.float64], seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-negative coefficients that explain the times best, every step's error counted relative to its time.

    features: [num_steps, num_features]. Columns that would have to be negative are left out, the worst first.
    """
    scaled = features / seconds[:, None]
    kept = np.arange(features.shape[1])
    while True:
        norms = np.linalg.norm(scaled[:, kept], axis=0)
        norms = np.where(norms > 0, norms, 1.0)
        solution = np.linalg.lstsq(scaled[:, kept] / norms, np.ones(len(seconds)), rcond=None)[0] / norms
        if (solution >= 0).all():
            result = np.zeros(features.shape[1])
            result[kept] = solution
            return result
        kept = np.delete(kept, int(np.argmin(solution * norms)))


def fit_steps(features: NDArray[np.float64], seconds: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """`fit` where the first tokens are free: the coefficients, and how many tokens cost no more than none.

    features: [num_steps, num_features], tokens in the second column, as of `StepMix.features`.
    """

    def freed(free_tokens: int) -> NDArray[np.float64]:
        changed: NDArray[np.float64] = features.copy()
        changed[:, 1] = np.maximum(changed[:, 1] - free_tokens, 0)
        return changed

    def error(free_tokens: int) -> float:
        changed = freed(free_tokens)
        return float(np.square(changed @ fit(changed, seconds) / seconds - 1).sum())

    best = min(_FREE_TOKENS, key=error)
    return fit(freed(best), seconds), float(best)


def measure(engine: LLMEngine, *, commit: str) -> HardwareProfile:
    """The profile of the device that `engine` runs on, with its model."""
    runner, kv_bytes = engine.runner, engine.kv_bytes_per_token
    timer = StepTimer(runner, num_blocks=engine.num_blocks, block_size=engine.limits.block_size)
    limits = MixLimits(
        max_num_seqs=engine.limits.max_num_seqs,
        max_num_batched_tokens=engine.limits.max_num_batched_tokens,
        max_model_len=engine.max_model_len,
        capacity_tokens=engine.num_blocks * engine.limits.block_size,
    )
    measured = limits.fit([*PREFILL_MIXES, *DECODE_MIXES])
    seconds = np.array([timer.seconds(mix) for mix in measured])
    features = np.array([mix.features(kv_bytes) for mix in measured])
    coefficients, free_tokens = fit_steps(features, seconds)
    features[:, 1] = np.maximum(features[:, 1] - free_tokens, 0)
    errors = np.abs(features @ coefficients / seconds - 1)
    log.info("%d kinds of steps; the fits are off by %.1f %% on average", len(measured), 100 * errors.mean())

    def cost(mix: StepMix) -> tuple[float, float]:
        parts = mix.features(kv_bytes)
        parts[1] = max(parts[1] - free_tokens, 0)
        return float((coefficients * parts)[:4].sum()), float((coefficients * parts)[4:].sum())

    on_gpu = limits.fit(SIDE_BY_SIDE_MIXES) if runner.model.device.type == "cuda" else []
    tried = [(mix, _side_by_side(mix, timer, runner)) for mix in on_gpu]
    fixed, token, sampled, pair, decode_fixed, kv_byte = np.maximum(coefficients, [0, *[_LEAST_SECONDS] * 3, 0, 1e-18])
    config, device = engine.config, runner.model.device
    return HardwareProfile(
        device=engine.device_name,
        memory_bytes=float(memory_bytes(device)),
        model=ProfiledModel.of(config),
        bytes_per_element=runner.model.dtype.itemsize,
        gemm=AffineFit(fixed_seconds=fixed, seconds_per_unit=token, free_units=free_tokens),
        head=AffineFit(fixed_seconds=0.0, seconds_per_unit=sampled),
        prefill_attention=AffineFit(fixed_seconds=0.0, seconds_per_unit=pair),
        decode_attention=AffineFit(fixed_seconds=decode_fixed, seconds_per_unit=kv_byte),
        interference=interference(tried, cost),
        side_by_side=tuple(sides for _, sides in tried),
        prefix_readers=1.0,
        commit=commit,
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _side_by_side(mix: StepMix, timer: StepTimer, runner: ModelRunner) -> SideBySide:
    """`mix` with decodes and chunks side by side, with the number of SMs for attention that makes it fastest."""
    ways, policy, runner.overlap = [], runner.overlap, None
    alone = timer.seconds(mix, _LASTING_REPETITIONS)
    for num_programs in _PROGRAMS:
        sides = SideBySide(
            num_kv_tokens=mix.num_decodes * mix.context_tokens,
            num_prefill_tokens=mix.num_chunks * mix.chunk_tokens,
            num_programs=num_programs,
            gain=_ALWAYS,
        )
        runner.overlap = OverlapPolicy((sides,))
        gain = alone / timer.seconds(mix, _LASTING_REPETITIONS)
        log.info("%s: %.1f ms in one piece; %d SMs for attention: %.3f times", mix, 1e3 * alone, num_programs, gain)
        ways.append(sides.model_copy(update={"gain": gain}))
    runner.overlap = policy
    return max(ways, key=lambda way: way.gain)


def interference(tried: Sequence[tuple[StepMix, SideBySide]], cost: Callable[[StepMix], tuple[float, float]]) -> float:
    """How much of the shorter of compute and memory work a step adds to the longer one: the mean over the steps tried,
    each run in the faster way. `cost` gives both in seconds. 1 where nothing was tried."""
    shares = []
    for mix, sides in tried:
        compute, memory = cost(mix)
        seconds = (compute + memory) / max(sides.gain, 1.0)
        shares.append((seconds - max(compute, memory)) / min(compute, memory))
    return float(np.clip(np.mean(shares), 0.0, 1.0)) if shares else 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure as the command line says and write the profile. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m blendserve.engine.profiler", description="Measure this device.")
    parser.add_argument("model", type=Path, help="a folder with config.json, tokenizer.json and weights")
    parser.add_argument("--output", type=Path, help=f"JSON file; by default one of its own in {PROFILES}")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto", help="dummy: random weights")
    parser.add_argument("--commit", default=f"version {blendserve.__version__}", help="what is measured")
    arguments = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    try:
        spec = EngineSpec.model_validate({"load_format": arguments.load_format})
        engine = LLMEngine(arguments.model, spec, SamplingSpec.model_validate({}))
        profile = measure(engine, commit=arguments.commit)
        output = arguments.output or PROFILES.expanduser() / f"{profile.device} {arguments.model.name}.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        write_profile(output, profile)
    except BlendServeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    sys.stdout.write(f"{output}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
