"""The kernels for Hopper compile, and fit into its shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MOST_SHARED_MEMORY = 227 * 1024  # bytes that one program may take on an H100


def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # compile in any case
    program = Path(__file__).with_name("compile_for_hopper.py")
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _shared in kernels] == [
        "_paged_attention_kernel",
        "_prefill_attention_kernel",
        "_shared_prefix_kernel",
        "_linear_kernel",
        "_linear_kernel",
    ]
    assert all(int(shared) <= MOST_SHARED_MEMORY for _name, shared in kernels)
