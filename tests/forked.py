"""Processes that tests kill, forked from one that has imported the heavy packages, so that they start at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

_PRELOADED = ["blendserve.cli", "blendserve.engine.run_shard", "blendserve.tokenizer", "transformers"]


def start(function: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Call `function` in a process of its own, the leader of a session; what it returns is its exit status."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_lead, args=(function, arguments))
    process.start()
    return process


def kill(process: BaseProcess) -> None:
    """The process and all that it started."""
    try:
        os.killpg(process.pid or 0, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()  # it had no time to become the leader of its session
    process.join()


def _lead(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    sys.exit(function(*arguments))
