"""Which of compute-sanitizer's findings are about these kernels: python sanitizer_findings.py LOG, prints them.

Left out are findings in kernels of others (PyTorch's, in which the twin is computed), reads there of what our kernels
wrote by TMA, which initcheck doesn't see, and races between the warps of a specialised kernel over which partition is
theirs: the compiler's code at the kernel's `def` and at `warp_specialize`, under named barriers that racecheck doesn't
follow. Ends with 1 if something is left.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[2] / "kernels/blendserve_kernels"
# "… at _linear_kernel+0xf0 in linear.py:271": the place in the source is there for kernels of Triton alone.
_PLACE = re.compile(r"\bat (\S+)\+0x[0-9a-f]+(?: in (\w+\.py):(\d+))?")


def findings(log: str) -> Iterator[list[str]]:
    """The lines of each finding, without the host's frames."""
    block: list[str] = []
    for line in log.splitlines():
        if not line.startswith("========="):
            continue
        text = line.removeprefix("=========").strip()
        if not text or "SUMMARY" in text or text == "COMPUTE-SANITIZER":
            if block:
                yield block
            block = []
        elif "Host Frame" not in text:
            block.append(text)


def is_dispatch(file: str, line: int) -> bool:
    """Whether the compiler hands out warp partitions there."""
    sources = [path.read_text().splitlines() for path in KERNELS.rglob(file)]
    found = [lines[line - 1].strip() for lines in sources if line <= len(lines)]
    return any(text.startswith("def _") or text == "gl.warp_specialize(" for text in found)


def is_ours(finding: list[str]) -> bool:
    """Whether the finding names a line of our kernels, and more than the compiler's dispatch."""
    places = [match.groups() for text in finding for match in _PLACE.finditer(text)]
    ours = [(file, int(line)) for _kernel, file, line in places if file]
    return bool(ours) and not (finding[0].startswith("Error: Race") and all(is_dispatch(*place) for place in ours))


def main() -> int:
    log = Path(sys.argv[1]).read_text(errors="replace")
    left = [finding for finding in findings(log) if is_ours(finding)]
    for finding in left:
        print("\n".join(finding))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
