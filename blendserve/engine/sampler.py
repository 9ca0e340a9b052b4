"""From logits to the next tokens, by the job's sampling settings."""

from __future__ import annotations

import hashlib

import torch

from blendserve.spec import SamplingSpec
from blendserve_kernels.sampling import greedy_checked, sample_checked


def request_seed(job_seed: int, request_id: str) -> int:
    """The seed of one request, in [0, 2^63): the same in any order, batch, shard or attempt."""
    digest = hashlib.blake2b(f"{job_seed}\n{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Sampler:
    """Greedy at temperature 0, else seeded temperature, top-k and top-p sampling."""

    def __init__(self, sampling: SamplingSpec, device: torch.device) -> None:
        self._sampling = sampling
        self._device = device

    def __call__(
        self, logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int64 [num_sampled] from logits [num_sampled, vocab_size], and whether each row is finite.

        seeds, positions: int64 [num_sampled]; positions is how many tokens each request has generated before this one.
        """
        if self._sampling.temperature == 0.0:
            return greedy_checked(logits)
        num_sampled = logits.shape[0]

        def full(value: float, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((num_sampled,), value, dtype=dtype, device=self._device)

        return sample_checked(
            logits,
            full(self._sampling.temperature, torch.float32),
            full(self._sampling.top_k, torch.int32),
            full(self._sampling.top_p, torch.float32),
            full(0.0, torch.float32),
            seeds,
            positions,
        )
