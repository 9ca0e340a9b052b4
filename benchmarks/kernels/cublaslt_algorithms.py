"""Whether another algorithm of cuBLASLt than its first choice takes less time once the GPU's power is the limit.

    PYTHONPATH=kernels:. python benchmarks/kernels/cublaslt_algorithms.py [--output FILE]

For the four products of a layer of the Llama-3.1-8B shape and 1,024 tokens, all algorithms that its heuristic proposes
are timed in short; those within a tenth of the best then run for most of a second each, as hot and as slow as the GPU
gets, beside torch's own product. At the power limit what takes less energy takes less time.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import partial

import torch

from benchmarks.kernels.measuring import DTYPE, PROJECTIONS, check_close, hot_seconds, median_seconds
from benchmarks.kernels.reports import Row, run_and_report

NUM_TOKENS, NUM_WEIGHTS, MOST_ALGORITHMS, MOST_LASTING, REPEATS = 1024, 4, 64, 8, 8
SECONDS, WORKSPACE_BYTES, NEAR = 0.6, 64 << 20, 1.1
# Of cublasLt.h: enumerators of 32 bits, and the attributes of an algorithm that tell one from another.
FLOAT32, BFLOAT16, COMPUTE_FLOAT32 = 0, 14, 68
TRANSPOSE_A, TRANSPOSED, WORKSPACE = 3, 1, 1
ATTRIBUTES = {"id": 0, "tile": 1, "split_k": 2, "swizzle": 4, "stages": 6, "inner_shape": 7, "cluster": 8}


class Algorithm(ctypes.Structure):
    _fields_ = (("data", c_uint64 * 8),)


class Proposal(ctypes.Structure):
    _fields_ = (
        ("algorithm", Algorithm),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class CublasLt:
    """x @ weight.T by a chosen algorithm: in cuBLAS's columns, weight transposed times x."""

    def __init__(self, num_in: int, num_out: int) -> None:
        self.library = ctypes.CDLL(f"libcublasLt.so.{str(torch.version.cuda).split('.')[0]}")
        self.handle, self.operation = c_void_p(), c_void_p()
        self.call("Create", byref(self.handle))
        self.call("MatmulDescCreate", byref(self.operation), c_int(COMPUTE_FLOAT32), c_int(FLOAT32))
        transposed = c_int(TRANSPOSED)
        self.call("MatmulDescSetAttribute", self.operation, c_int(TRANSPOSE_A), byref(transposed), c_size_t(4))
        self.layouts = []
        for rows, columns in ((num_in, num_out), (num_in, NUM_TOKENS), (num_out, NUM_TOKENS)):
            layout = c_void_p()
            size = (c_uint64(rows), c_uint64(columns), c_int64(rows))
            self.call("MatrixLayoutCreate", byref(layout), c_int(BFLOAT16), *size)
            self.layouts.append(layout)
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")

    def call(self, name: str, *arguments: object) -> None:
        status = getattr(self.library, f"cublasLt{name}")(*arguments)
        if status != 0:
            raise RuntimeError(f"cublasLt{name} gave status {status}")

    def proposals(self) -> list[Algorithm]:
        preference, most = c_void_p(), c_size_t(WORKSPACE_BYTES)
        self.call("MatmulPreferenceCreate", byref(preference))
        self.call("MatmulPreferenceSetAttribute", preference, c_int(WORKSPACE), byref(most), c_size_t(8))
        found, count = (Proposal * MOST_ALGORITHMS)(), c_int()
        weight, x, out = self.layouts
        self.call(
            "MatmulAlgoGetHeuristic",
            *(self.handle, self.operation, weight, x, out, out, preference),
            *(c_int(MOST_ALGORITHMS), found, byref(count)),
        )
        return [proposal.algorithm for proposal in found[: count.value] if proposal.state == 0]

    def run(self, algorithm: Algorithm, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        one, zero = c_float(1.0), c_float(0.0)
        pointers = [c_void_p(tensor.data_ptr()) for tensor in (weight, x, out)]
        layouts = self.layouts
        self.call(
            "Matmul",
            *(self.handle, self.operation, byref(one), pointers[0], layouts[0], pointers[1], layouts[1], byref(zero)),
            *(pointers[2], layouts[2], pointers[2], layouts[2], byref(algorithm)),
            *(c_void_p(self.workspace.data_ptr()), c_size_t(WORKSPACE_BYTES)),
            c_void_p(torch.cuda.current_stream().cuda_stream),
        )

    def describe(self, algorithm: Algorithm) -> str:
        parts = []
        for name, attribute in ATTRIBUTES.items():
            value, written = c_uint32(), c_size_t()
            arguments = (c_int(attribute), byref(value), c_size_t(4), byref(written))
            status = self.library.cublasLtMatmulAlgoConfigGetAttribute(byref(algorithm), *arguments)
            if status == 0:
                parts.append(f"{name} {value.value & (0xFFFF if written.value == 2 else 0xFFFFFFFF)}")
        return " ".join(parts)


def run_repeatedly(calls: list[Callable[[], object]]) -> None:
    for call in calls * REPEATS:
        call()


def measure_product(num_in: int, num_out: int) -> list[Row]:
    x = torch.randn(NUM_TOKENS, num_in, device="cuda").to(DTYPE)
    weights = [torch.empty(num_out, num_in, device="cuda", dtype=DTYPE).normal_(0, 0.02) for _ in range(NUM_WEIGHTS)]
    out = torch.empty(NUM_TOKENS, num_out, device="cuda", dtype=DTYPE)
    library = CublasLt(num_in, num_out)

    def calls_of(algorithm: Algorithm) -> list[Callable[[], object]]:
        return [partial(library.run, algorithm, x, weight, out) for weight in weights]

    short: list[tuple[float, Algorithm]] = []
    expected = x @ weights[-1].t()
    for algorithm in library.proposals():
        seconds = median_seconds(calls_of(algorithm), 5)
        check_close(library.describe(algorithm), out, expected)
        short.append((seconds, algorithm))
    best = min(seconds for seconds, _ in short)
    candidates: dict[str, list[Callable[[], object]]]
    candidates = {"torch": [partial(torch.nn.functional.linear, x, weight) for weight in weights]}
    near = sorted((one for one in short if one[0] < NEAR * best), key=lambda one: one[0])
    candidates |= {library.describe(algorithm): calls_of(algorithm) for _, algorithm in near[:MOST_LASTING]}
    rows = []
    for name, calls in candidates.items():
        in_short = median_seconds(calls, 5)
        seconds, clock, watts = hot_seconds(partial(run_repeatedly, calls), SECONDS)
        each = seconds / REPEATS / len(calls)
        row = {"shape": f"{num_in}x{num_out}", "algorithm": name, "short_us": in_short * 1e6, "us": each * 1e6}
        rows.append(row | {"clock": clock, "power": watts})
    return rows


@torch.inference_mode()
def run() -> Row:
    return {"tokens": NUM_TOKENS, "rows": [row for shape in PROJECTIONS for row in measure_product(*shape)]}


if __name__ == "__main__":
    run_and_report(__doc__, run)
