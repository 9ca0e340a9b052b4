"""Compute and memory time that a simulated machine still has before it, corrected as requests turn out otherwise."""

from __future__ import annotations

from blendserve.planner.simulation import SimulatedMachine, StepWork


class WorkLeft:
    """What is assigned, plus what admitted requests are expected to decode, less what has been done."""

    __slots__ = ("_decode_seconds", "_kv_seconds", "compute", "memory")

    def __init__(self, machine: SimulatedMachine) -> None:
        self._decode_seconds = machine.decode_token_seconds
        self._kv_seconds = machine.constants.seconds_per_kv_token
        self.compute = self.memory = 0.0

    def assign(self, compute_seconds: float, memory_seconds: float) -> None:
        """Start again with what a plan says."""
        self.compute, self.memory = compute_seconds, memory_seconds

    def expect(self, num_prompt_tokens: int, first: int, last: int) -> None:
        """Add decoding output tokens `first` to `last` of a request; take it off where last < first."""
        self.compute += (last - first) * self._decode_seconds
        read = (last - first) * num_prompt_tokens + (last * last - first * first) / 2
        self.memory += read * self._kv_seconds

    def do(self, work: StepWork) -> None:
        """Take off what has been done."""
        self.compute -= work.needed_compute
        self.memory -= work.memory
