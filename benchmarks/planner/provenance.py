"""What a result has to carry: machine, command and commit, read when a benchmark starts, because HEAD may move on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def provenance() -> dict[str, str]:
    git = ["git", "rev-parse", "HEAD"]
    return {
        "machine": "2-core x86-64 CPU",
        "command": f"python benchmarks/planner/{' '.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
    }
