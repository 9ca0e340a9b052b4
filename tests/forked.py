"""Processes that tests kill, forked from one that has imported the heavy packages, so that they start at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_PRELOADED = [
    *("blendserve.cli", "blendserve.engine.run_shard", "blendserve.tokenizer"),
    *("transformers.models.auto.tokenization_auto", "transformers.models.llama.configuration_llama"),
]


def start(function: Callable[..., Any], *arguments: Any, output: Path | None = None) -> BaseProcess:
    """Call `function` in a process of its own, the leader of a session; what it returns is its exit status.

    `output` is the file that its stdout and stderr go to.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_lead, args=(function, arguments, output))
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    """The process and all that it started."""
    try:
        os.killpg(process.pid or 0, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()  # it had no time to become the leader of its session
    process.join()


def _lead(function: Callable[..., Any], arguments: tuple[Any, ...], output: Path | None) -> None:
    os.setsid()
    if output is not None:
        file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        for stream in (1, 2):
            os.dup2(file, stream)
    sys.exit(function(*arguments))
