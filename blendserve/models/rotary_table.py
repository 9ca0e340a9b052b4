"""The table of cosines and sines that rotary position embedding looks up."""

from __future__ import annotations

import math

import torch

from blendserve.models.config import RopeConfig


def rotary_table(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> torch.Tensor:
    """float32 [num_positions, head_dim]: the first half of a row are cosines, the second half sines."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = _scaled(1.0 / (rope.theta**exponents), rope)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def _scaled(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Stretch the frequencies [head_dim / 2] as the rope type asks (llama3: long waves by `factor`, short ones not)."""
    if rope.rope_type == "default":
        return frequencies
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_position_embeddings / wavelengths
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept_share = smooth.clamp(0.0, 1.0)
    return (1 - kept_share) * frequencies / rope.factor + kept_share * frequencies
