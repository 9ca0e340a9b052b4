"""The errors that every op raises for arguments it can't run on. Reads shapes and dtypes, never values: no sync."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def check_shape(name: str, tensor: torch.Tensor, expected: Sequence[int]) -> None:
    """Raise ValueError unless `tensor` has exactly the shape `expected`."""
    if tensor.shape != tuple(expected):
        raise ValueError(f"Invalid shape of {name}: expected {list(expected)}, got {list(tensor.shape)}")


def check_rank(name: str, tensor: torch.Tensor, dimensions: str) -> None:
    """Raise ValueError unless `tensor` has as many dimensions as `dimensions` names, e.g. "[num_tokens, hidden]"."""
    if tensor.ndim != dimensions.count(",") + 1:
        raise ValueError(f"Invalid shape of {name}: expected {dimensions}, got {list(tensor.shape)}")


def check_dtype(name: str, tensor: torch.Tensor, expected: torch.dtype) -> None:
    """Raise TypeError unless `tensor` has the dtype `expected`."""
    if tensor.dtype != expected:
        raise TypeError(f"Invalid dtype of {name}: expected {expected}, got {tensor.dtype}")


def check_same_device(reference_name: str, reference: torch.Tensor, **tensors: torch.Tensor) -> None:
    """Raise ValueError unless every tensor lives on the device of `reference`."""
    for name, tensor in tensors.items():
        if tensor.device != reference.device:
            raise ValueError(
                f"Invalid device of {name}: expected {reference.device} like {reference_name}, got {tensor.device}"
            )


def check_inner_contiguous(name: str, tensor: torch.Tensor, num_inner_dimensions: int) -> None:
    """Raise ValueError unless the last `num_inner_dimensions` dimensions lie densely; outer strides are free."""
    expected_stride = 1
    for dimension in range(tensor.ndim - 1, tensor.ndim - 1 - num_inner_dimensions, -1):
        size = tensor.shape[dimension]
        if size != 1 and tensor.stride(dimension) != expected_stride:
            raise ValueError(
                f"Invalid strides of {name}: expected the last {num_inner_dimensions} dimensions contiguous, "
                f"got strides {list(tensor.stride())} for shape {list(tensor.shape)}; call .contiguous() first"
            )
        expected_stride *= size


def check_out(out: torch.Tensor | None, q: torch.Tensor) -> None:
    """Check where attention over q is to be written, if anywhere: like q, but without gaps."""
    if out is None:
        return
    check_shape("out", out, q.shape)
    check_dtype("out", out, q.dtype)
    check_same_device("q", q, out=out)
    check_inner_contiguous("out", out, 3)


def check_kv_cache(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Check a layer's caches [num_blocks, num_kv_heads, block_size, head_dim] against q [T, num_heads, head_dim]."""
    check_rank("q", q, "[num_tokens, num_heads, head_dim]")
    check_rank("k_cache", k_cache, "[num_blocks, num_kv_heads, block_size, head_dim]")
    check_shape("v_cache", v_cache, k_cache.shape)
    check_shape("k_cache", k_cache, [*k_cache.shape[:3], q.shape[2]])
    num_heads, num_kv_heads = q.shape[1], k_cache.shape[1]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"Invalid shape of q: expected a multiple of num_kv_heads={num_kv_heads} heads, got {list(q.shape)}"
        )
    check_dtype("k_cache", k_cache, q.dtype)
    check_dtype("v_cache", v_cache, q.dtype)
    check_inner_contiguous("q", q, 2)
    check_inner_contiguous("k_cache", k_cache, 4)
    check_inner_contiguous("v_cache", v_cache, 4)
