"""What nvidia-smi says of this machine's GPUs. Needs no torch, so that a planner can ask too."""

from __future__ import annotations

import shutil
import subprocess


def query_gpus(field: str) -> list[str]:
    """`field` (`name`, `index`) of each GPU; none where nvidia-smi or its driver is missing."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)  # noqa: S603 - fixed words
    except (OSError, subprocess.SubprocessError):
        return []  # nvidia-smi without a driver
    return [line.strip() for line in answer.stdout.strip().splitlines()]
