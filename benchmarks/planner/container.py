"""Planning within a memory limit that the kernel enforces: a control group, as a container is one.

    python benchmarks/planner/container.py --requests 1000000 --tokens 100 --limit 1073741824 --output results.json

Needs the right to make a control group (version 1 or 2), as root has it. What the limit counts is all that the planner
touches: its own memory, DuckDB's, and the pages of the files it reads and writes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from provenance import provenance
from scale import write_table

from blendserve.job_folder import JobFolder

CGROUPS = Path("/sys/fs/cgroup")
NAME = "blendserve-benchmark"


class ControlGroup:
    """A control group with a limit, gone again at the end."""

    def __init__(self, limit_bytes: int) -> None:
        self._is_second = (CGROUPS / "cgroup.controllers").exists()
        self._folder = CGROUPS / NAME if self._is_second else CGROUPS / "memory" / NAME
        self._folder.mkdir()
        name = "memory.max" if self._is_second else "memory.limit_in_bytes"
        (self._folder / name).write_text(str(limit_bytes))

    def __enter__(self) -> ControlGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.rmdir()

    def join(self) -> None:
        """Put the calling process in."""
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    def most_bytes(self) -> int:
        name = "memory.peak" if self._is_second else "memory.max_usage_in_bytes"
        return int((self._folder / name).read_text())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--limit", type=int, default=2**30)
    parser.add_argument("--folder")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    origin = provenance()
    scale = Path(__file__).with_name("scale.py")
    with TemporaryDirectory(dir=arguments.folder) as root:
        write_table(JobFolder(Path(root)), arguments.requests, arguments.tokens)
        command = [sys.executable, str(scale), "--measure", "planner", "--folder", root]
        with ControlGroup(arguments.limit) as group:
            started = time.monotonic()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=group.join)
            figures = {
                "num_requests": arguments.requests,
                "num_tokens": arguments.requests * arguments.tokens,
                "limit_bytes": arguments.limit,
                "exit_status": done.returncode,
                "seconds_with_start": time.monotonic() - started,
                "most_bytes_in_group": group.most_bytes(),
            }
        if done.returncode == 0:
            figures["planner"] = json.loads(done.stdout)
    result = {**origin, **figures}
    print(json.dumps(result, indent=1))
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
