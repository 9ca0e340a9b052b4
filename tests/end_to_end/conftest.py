"""The `blendserve` command as a user runs it, on an input that a tiny model handles in seconds."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blendserve.cli import app
from tests.end_to_end.command_line import Blendserve, Finished, command, run_engines_here, write_requests


@pytest.fixture
def blendserve_process() -> Blendserve:
    """The command in a process of its own, and the engine in another: the real thing, at seconds a call."""

    def call(*arguments: object) -> Finished:
        done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=240)
        return Finished(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def blendserve(monkeypatch: pytest.MonkeyPatch) -> Blendserve:
    """The command in the test's own process, the engine too: all the same code but for the process boundary."""
    run_engines_here(monkeypatch)

    def call(*arguments: object, cwd: Path | None = None) -> Finished:
        if cwd is not None:
            monkeypatch.chdir(cwd)
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return Finished(done.exit_code, done.stdout, done.stderr)

    return call


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    """Rows of two kinds: short answers under one long instruction, long answers to short prompts; four duplicates."""
    path = tmp_path / "requests.parquet"
    write_requests(path)
    return path
