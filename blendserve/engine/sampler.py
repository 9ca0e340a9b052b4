"""From logits to the next tokens, by the job's sampling settings."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray

from blendserve.spec import SamplingSpec
from blendserve_kernels.sampling import greedy, sample


def request_seed(job_seed: int, request_id: str) -> int:
    """The seed of one request, in [0, 2^63): the same in any order, batch, shard or attempt."""
    digest = hashlib.blake2b(f"{job_seed}\n{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Sampler:
    """Greedy at temperature 0, else seeded temperature, top-k and top-p sampling."""

    def __init__(self, sampling: SamplingSpec, device: torch.device) -> None:
        self._sampling = sampling
        self._device = device

    def __call__(self, logits: torch.Tensor, seeds: NDArray[np.int64], positions: NDArray[np.int64]) -> torch.Tensor:
        """Token ids int64 [num_sampled] from float32 logits [num_sampled, vocab_size].

        positions: how many tokens each request has generated before this one.
        """
        if self._sampling.temperature == 0.0:
            return greedy(logits)
        num_sampled = logits.shape[0]

        def full(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((num_sampled,), value, dtype=dtype, device=self._device)

        return sample(
            logits,
            full(self._sampling.temperature, torch.float32),
            full(self._sampling.top_k, torch.int32),
            full(self._sampling.top_p, torch.float32),
            full(0.0, torch.float32),
            torch.from_numpy(seeds).to(self._device),
            torch.from_numpy(positions).to(self._device),
        )
