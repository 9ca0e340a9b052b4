"""Forward passes captured as CUDA graphs, one for each step shape that pays, so that a step is one launch.

A pass of a few hundred tokens takes a GPU less time than Python needs to launch its kernels one by one. Shapes are
padded to few sizes, captured when they are seen for the second time, and share their memory: only one runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from blendserve.engine.step_inputs import StepShape

# Beyond this many tokens the GPU takes longer than Python does.
_MAX_TOKENS = 2048
_MAX_CHUNKS = 128


def padded_shape(num_decodes: int, num_prefill_tokens: int, num_chunks: int) -> StepShape:
    """The shape that a step runs in on a GPU: few kinds of shapes, since each is captured and some are compiled for."""
    if num_chunks == 0:
        num_decodes = _padded_decodes(num_decodes)
        return StepShape(num_decodes, num_decodes, 0)
    num_tokens = _round_up(num_decodes + num_prefill_tokens, 128)
    padded_decodes = next((size for size in (0, 128, 256, 512, 1024) if num_decodes <= size), num_tokens)
    return StepShape(num_tokens, min(padded_decodes, num_tokens), _round_up(num_chunks, _MAX_CHUNKS))


def overlapped_shape(num_decodes: int, num_prefill_tokens: int, num_chunks: int, num_programs: int) -> StepShape:
    """The same where decodes and chunks run side by side, each with padding of its own."""
    decodes = _round_up(num_decodes, 64)
    return StepShape(
        decodes + _round_up(num_prefill_tokens, 128), decodes, _round_up(num_chunks, _MAX_CHUNKS), num_programs
    )


def is_captured(shape: StepShape) -> bool:
    if shape.num_programs:  # Python can't launch two streams at one time
        return shape.num_tokens <= 2 * _MAX_TOKENS
    # Decodes that go through as chunks are many.
    return shape.num_tokens <= _MAX_TOKENS and (shape.num_chunks <= _MAX_CHUNKS or shape.num_decodes == 0)


def padded_samples(num_sampled: int) -> int:
    """How many tokens are sampled from where `num_sampled` are wanted."""
    return _round_up(num_sampled, 16 if num_sampled <= 64 else 64)


def shapes_to_prepare(max_num_seqs: int, max_num_batched_tokens: int, has_chunks_only: bool) -> list[StepShape]:
    """All captured shapes within these limits and one of each other kind, the largest first: they share its memory.

    has_chunks_only: decodes go through as chunks.
    """
    largest = min(_MAX_TOKENS, max_num_batched_tokens)
    all_tokens = [*range(128, largest + 1, 128), max_num_batched_tokens]
    counts = range(0, max_num_seqs + 127, 128)
    if has_chunks_only:
        shapes = {padded_shape(0, tokens, min(count + 1, tokens)) for tokens in all_tokens for count in counts}
    else:
        shapes = {padded_shape(number, 0, 0) for number in range(1, max_num_seqs + 1)}
        mixed = {(min(number, tokens - 1), tokens) for tokens in all_tokens for number in counts}
        shapes |= {padded_shape(number, tokens - number, 1) for number, tokens in mixed}
        most = max_num_batched_tokens
        shapes |= {
            padded_shape(number, most - number, chunks)
            for chunks in (2 * _MAX_CHUNKS, 4 * _MAX_CHUNKS, 8 * _MAX_CHUNKS)
            for number in counts
            if chunks <= min(most - number, max_num_seqs - number)
        }
    return sorted(shapes, key=lambda shape: (shape.num_tokens, shape.num_decodes, shape.num_chunks), reverse=True)


def _padded_decodes(num_decodes: int) -> int:
    for limit, multiple in ((8, 1), (32, 8), (128, 16), (512, 32)):
        if num_decodes <= limit:
            return _round_up(num_decodes, multiple)
    return _round_up(num_decodes, 64)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class CapturedPasses:
    """Graphs by shape. All read their inputs from the same place, and each leaves its output in its own."""

    def __init__(self, device: torch.device) -> None:
        # Decodes go first where they run beside prefill chunks: theirs are the small kernels.
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._seen: set[StepShape] = set()

    def run(self, shape: StepShape, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The output of `forward`, launched or replayed. It must do the same for a shape each time, with no sync."""
        if shape not in self._graphs:
            if shape not in self._seen:  # compiles kernels and loads them, which a capture doesn't allow
                self._seen.add(shape)
                return forward()
            self._graphs[shape] = self._capture(forward)
        graph, output = self._graphs[shape]
        graph.replay()
        return output

    def _capture(self, forward: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                output = forward()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph, output
