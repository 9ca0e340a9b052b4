"""Compiles the kernels for Hopper without a GPU, by launching them on CPU tensors with a driver that only names one.

Run as a program, since Triton must be imported without its interpreter. Prints a line per kernel: name, shared memory.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from blendserve_kernels.gluon_kernels import decode_attention, linear, prefill_attention, shared_prefix_attention


class _NamedGpu:
    """What Triton asks its driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile_only(run: Any) -> Any:
    def compile_kernel(function: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        kernel = run(function, *arguments, grid=grid, warmup=True, **constants)
        sys.stdout.write(f"{function.__name__} {kernel.metadata.shared}\n")

    return compile_kernel


def main() -> None:
    """Launch each kernel on one set of sizes."""
    driver.set_active(_NamedGpu())
    jit.JITFunction.run = _compile_only(jit.JITFunction.run)
    ints = torch.zeros(64, dtype=torch.int32)
    q, cache = torch.zeros(4, 8, 128, dtype=torch.bfloat16), torch.zeros(4, 2, 128, 128, dtype=torch.bfloat16)
    tables, out = ints.view(4, 16), torch.empty_like(q)
    plan, lse = (ints, ints, ints, ints), torch.zeros(8, 4, 8)
    decode_attention.launch(q, cache, cache.clone(), 0.1, *plan, out, 48, begins_early=True)
    prefill_attention.launch(q, cache, cache.clone(), tables, 0.1, 4, ints, ints, out, 132)
    given = (q, cache, cache.clone(), tables, 0.1, 4, ints, ints)
    shared_prefix_attention.launch(*given, *plan, ints, lse, out, 132)
    x, weight = torch.zeros(8, 128, dtype=torch.bfloat16), torch.zeros(512, 128, dtype=torch.bfloat16)
    linear.launch(x, weight, torch.empty(8, 256, dtype=torch.bfloat16), True, 132)
    linear.launch(x, weight, torch.empty(8, 512, dtype=torch.bfloat16), False, 132)


if __name__ == "__main__":
    main()
