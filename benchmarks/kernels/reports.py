"""What every kernel benchmark's report says of its run, and how it is printed and written."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.kernels.measuring import current_commit

Row = dict[str, Any]


def describe_run() -> Row:
    """Return device, versions, commit and command."""
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": current_commit(),
        "command": f"python {sys.argv[0]}",
    }


def print_rows(report: Row) -> None:
    """Print the report in as few lines as it has rows."""
    print(f"{report['device']}, torch {report['torch']}, triton {report['triton']}, commit {report['commit'][:12]}")
    for key, value in report.items():
        if key.endswith("_per_s"):
            print(key, value)
    for row in report["rows"]:
        figures = [f"{key} {value:.3f}" for key, value in row.items() if isinstance(value, float)]
        names = [str(value) for value in row.values() if not isinstance(value, float)]
        print(f"{' '.join(names):32}", "  ".join(figures))


def run_and_report(description: str | None, run: Callable[[], Row]) -> None:
    """Measure, print, and with --output write the report as JSON; --commit names the commit where there is no git."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, help="JSON file for the report")
    parser.add_argument("--commit", help="the commit measured, where the tree has no git")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    report = describe_run() | run()
    report["commit"] = arguments.commit or report["commit"]
    print_rows(report)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
