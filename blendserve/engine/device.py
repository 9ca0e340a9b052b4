"""Which device and number format a shard runs with, and how large its KV cache may be."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from blendserve.errors import UsageError
from blendserve.models.config import ModelConfig
from blendserve.spec import EngineSpec

# Of the RAM that is free when the engine starts, or of what its container may have: other processes live there too.
_CPU_MEMORY_SHARE = 0.25
_CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
# Of all GPU memory, kept free for what the profile run didn't show: fragmentation, libraries, graphs.
_GPU_RESERVE_SHARE = 0.05
_MEMORY_MARKS = ("out of memory", "STATUS_ALLOC_FAILED")  # of CUDA and Triton; of cuBLAS and cuDNN


def resolve_device(engine: EngineSpec) -> torch.device:
    """The device that `engine` asks for. Raises UsageError for cuda where there is none."""
    has_cuda = torch.cuda.is_available()
    if engine.device == "cuda" and not has_cuda:
        raise UsageError("Option 'device': cuda was asked for, but torch sees no GPU. Use auto or cpu.")
    return torch.device("cuda" if has_cuda and engine.device != "cpu" else "cpu")


def resolve_dtype(engine: EngineSpec, device: torch.device) -> torch.dtype:
    if engine.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[engine.dtype]
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def describe_device(device: torch.device) -> str:
    """What a report calls the device, e.g. "NVIDIA H100 80GB HBM3" or "cpu, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def memory_bytes(device: torch.device) -> int:
    """All memory of the device, used or not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one KV cache block: K and V of all layers."""
    return config.kv_elements_per_token * block_size * dtype.itemsize


def free_memory_bytes(device: torch.device, activation_bytes: int) -> int:
    """Bytes that the KV cache may take, once the weights are loaded. activation_bytes: what a step needs beside it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - activation_bytes - _GPU_RESERVE_SHARE * total)
    limits = [path.read_text(encoding="ascii").strip() for path in _CONTAINER_LIMITS if path.exists()]
    available = [psutil.virtual_memory().available, *(int(limit) for limit in limits if limit.isdigit())]
    return int(min(available) * _CPU_MEMORY_SHARE)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or one that led to it, says that the device had no memory left.

    torch has a type for what its tensors lack; libraries, drivers and captures say it in the text of a RuntimeError.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(mark in str(error) for mark in _MEMORY_MARKS):
            return True
        error = error.__cause__ or error.__context__
    return False


def count_blocks(available_bytes: int, bytes_per_block: int, max_useful_blocks: int) -> int:
    """How many KV cache blocks to have. Raises UsageError when there is no memory for two."""
    num_blocks = min(available_bytes // bytes_per_block, max_useful_blocks)
    if num_blocks < 2:
        raise UsageError(
            f"No memory for a KV cache: {max(available_bytes, 0):,} bytes are free for it, a block takes "
            f"{bytes_per_block:,}. Use a smaller block_size, a shorter number format or a smaller model."
        )
    return num_blocks
