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
# Prefill chunks of a captured step; padding costs programs that end at once.
_MAX_CHUNKS = 128


def padded_shape(num_decodes: int, num_prefill_tokens: int, num_chunks: int) -> StepShape | None:
    """The shape to run a step in, with some padding, or None where a capture doesn't pay."""
    if num_chunks == 0:
        num_decodes = _padded_decodes(num_decodes)
        return StepShape(num_decodes, num_decodes, 0) if num_decodes <= _MAX_TOKENS else None
    num_tokens = -(-(num_decodes + num_prefill_tokens) // 128) * 128
    if num_tokens > _MAX_TOKENS or num_chunks > _MAX_CHUNKS:
        return None
    padded_decodes = min(-(-num_decodes // 128) * 128, num_tokens)
    return StepShape(num_tokens, padded_decodes, _MAX_CHUNKS)


def shapes_to_capture(max_num_seqs: int, max_num_batched_tokens: int) -> list[StepShape]:
    """Every shape that `padded_shape` gives within these limits, the largest first so that they share its memory."""
    decodes = {padded_shape(number, 0, 0) for number in range(1, max_num_seqs + 1)}
    mixed = {
        padded_shape(number, tokens - number, 1)
        for tokens in range(128, min(_MAX_TOKENS, max_num_batched_tokens) + 1, 128)
        for number in range(0, min(tokens, -(-max_num_seqs // 128) * 128 + 1), 128)
    }
    shapes = [shape for shape in decodes | mixed if shape is not None]
    return sorted(shapes, key=lambda shape: (shape.num_tokens, shape.num_decodes, shape.num_chunks), reverse=True)


def _padded_decodes(num_decodes: int) -> int:
    for limit, multiple in ((8, 1), (32, 8), (128, 16), (512, 32)):
        if num_decodes <= limit:
            return -(-num_decodes // multiple) * multiple
    return -(-num_decodes // 64) * 64


class CapturedPasses:
    """Graphs by shape. All read their inputs from the same place, and each leaves its output in its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._seen: set[StepShape] = set()

    @property
    def num_captured(self) -> int:
        return len(self._graphs)

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
