"""Products with fixed weight matrices: cuBLAS or a fused kernel on a GPU, oneDNN with packed weights on a CPU."""

from __future__ import annotations

import torch

from blendserve_kernels.linear import can_limit_programs, linear
from blendserve_kernels.linear_silu_and_multiply import interleave_gate_up, linear_silu_and_multiply
from blendserve_kernels.silu_and_multiply import silu_and_multiply

# oneDNN chooses its layout for about this many rows; the same layout is as good for one row and for hundreds.
_PACKED_FOR_ROWS = 32


class Linear:
    """x → x weight^T + bias, with weight [out_features, in_features] and bias [out_features] or none.

    On a CPU float32 weights are packed once: for a decode step of 4 to 64 requests that takes half to two thirds of the
    time of torch's own linear, which packs them on each call. The packed copy is the only one that is kept here.
    """

    __slots__ = ("_bias", "_can_limit_programs", "_is_batch_invariant", "_is_packed", "_weight")

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, is_batch_invariant: bool = False
    ) -> None:
        """is_batch_invariant: on a GPU, a row's product is bitwise the same whatever the other rows are."""
        self._bias = bias
        self._is_batch_invariant = is_batch_invariant
        self._can_limit_programs = can_limit_programs(weight)
        has_onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        self._is_packed = has_onednn and weight.device.type == "cpu" and weight.dtype == torch.float32
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS) if self._is_packed else weight

    def __call__(self, x: torch.Tensor, num_programs: int | None = None) -> torch.Tensor:
        """[num_rows, in_features] → [num_rows, out_features].

        num_programs: how many SMs it may take, where they can be limited; all by default.
        """
        if self._is_packed:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return product
        if self._is_batch_invariant:
            return linear(x, self._weight, self._bias)
        if num_programs is not None and self._can_limit_programs:
            return linear(x, self._weight, self._bias, num_programs, is_batch_invariant=False)
        return torch.nn.functional.linear(x, self._weight, self._bias)


class GatedLinear:
    """x → silu(x gate^T + b) * (x up^T + b), with gate and up [out_features, in_features], biases or none.

    On a GPU one kernel does it all where it is faster, so that the two products are never written.
    """

    __slots__ = ("_weights",)

    def __init__(
        self,
        gate: torch.Tensor,
        up: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        is_batch_invariant: bool = False,
    ) -> None:
        """bias: [2 * out_features], of gate, then of up."""
        self._weights: torch.Tensor | Linear
        if gate.is_cuda and bias is None and gate.shape[0] % 8 == 0 and not is_batch_invariant:
            self._weights = interleave_gate_up(gate, up)
        else:
            self._weights = Linear(torch.cat((gate, up)), bias, is_batch_invariant=is_batch_invariant)

    def __call__(self, x: torch.Tensor, num_programs: int | None = None) -> torch.Tensor:
        """[num_rows, in_features] → [num_rows, out_features]; num_programs as for `Linear`."""
        if isinstance(self._weights, Linear):
            return silu_and_multiply(self._weights(x, num_programs))
        return linear_silu_and_multiply(x, self._weights, num_programs)
