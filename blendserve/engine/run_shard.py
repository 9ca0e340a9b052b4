"""Runs shards of a plan, in a process of its own: `python -m blendserve.engine.run_shard PLAN_DIR [N]`.

With N it runs that shard. Without, it asks for one after the other, `{"event": "next"}` on stderr, and takes its number
as a line of stdin until that ends. It asks when it has room, before the last requests of a shard are through.

Whatever an earlier attempt finished is kept and not run again. shard.json, written last, says that a shard is done.
Messages and events (JSON lines) go to stderr, the manifest of each shard as a line to stdout; prompts go nowhere unless
the plan says that they shall be logged.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blendserve.engine.shard_attempt import Progress as Progress
from blendserve.engine.shard_runner import ShardRunner
from blendserve.errors import BlendServeError, Interrupted, PlanError
from blendserve.manifest import ShardManifest

_STDIN = 0


def run_shard(
    plan_dir: Path,
    shard: int,
    *,
    should_stop: Callable[[], bool],
    on_progress: Callable[[Progress], None] | None,
    completions: str | None = None,
) -> ShardManifest:
    """Run what is left of a shard of the plan in `plan_dir`; see `ShardRunner.run`."""
    done: list[ShardManifest] = []
    runner = ShardRunner(
        plan_dir,
        [shard],
        should_stop=should_stop,
        on_done=done.append,
        on_progress=on_progress,
        completions=completions,
    )
    runner.run(GivenOrders([shard]))
    return done[0]


class GivenOrders:
    """Shards that are known from the beginning."""

    def __init__(self, shards: Iterable[int]) -> None:
        self._shards = iter(shards)

    def poll(self) -> int | None:
        return next(self._shards, None)

    wait = poll


class AskedOrders:
    """Shards whose numbers come in on stdin, asked for one at a time."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._is_asked = self._is_ended = False

    def read(self, on_end: Callable[[], None]) -> None:
        """Read stdin to its end, which is told to `on_end` and ends the orders. For a thread of its own."""
        # The bare descriptor: a thread inside sys.stdin would hold its lock and break the interpreter's end.
        for line in io.FileIO(_STDIN, closefd=False):
            self._lines.put(line)
        on_end()
        self.end()

    def end(self) -> None:
        """No more are waited for. May be called in a signal handler."""
        self._lines.put(None)

    def wait(self) -> int | None:
        self._ask()
        return None if self._is_ended else self._number(self._lines.get())

    def poll(self) -> int | None:
        self._ask()
        try:
            return None if self._is_ended else self._number(self._lines.get_nowait())
        except queue.Empty:
            return None

    def _ask(self) -> None:
        if not self._is_asked:
            _tell("next")
            self._is_asked = True

    def _number(self, line: bytes | None) -> int | None:
        if line is None:
            self._is_ended = True
            return None
        self._is_asked = False
        if not line.strip().isdigit():
            raise PlanError(f"Expected the number of a shard as a line of stdin, got {line!r}.")
        return int(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Run shards as the command line says. Returns the exit status: 0 done, 130 stopped, else that of the error."""
    arguments = _parse(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    stop, signalled, asked = threading.Event(), threading.Event(), AskedOrders()

    def on_signal(*_: object) -> None:
        signalled.set()
        stop.set()
        asked.end()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    is_asking = arguments.shard is None
    if is_asking or arguments.stop_at_eof:
        on_end = stop.set if arguments.stop_at_eof else lambda: None
        threading.Thread(target=asked.read, args=(on_end,), daemon=True).start()
    given = None if is_asking else [arguments.shard]
    try:
        runner = ShardRunner(
            arguments.plan_dir,
            given,
            should_stop=stop.is_set,
            on_done=_tell_done,
            on_progress=lambda progress: _tell("progress", **asdict(progress)),
            completions=arguments.completions,
        )
        runner.run(asked if given is None else GivenOrders(given))
    except BlendServeError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    return Interrupted.exit_status if is_asking and signalled.is_set() else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m blendserve.engine.run_shard", description="Run a plan's shards.")
    parser.add_argument("plan_dir", type=Path, help="the folder of plan.json")
    parser.add_argument("shard", type=int, nargs="?", help="the shard's number, from 0; by default as stdin says")
    parser.add_argument("--completions", help="folder or URL of the completions' folder; by default the plan's")
    parser.add_argument("--stop-at-eof", action="store_true", help="stop when stdin is closed, as by a dead parent")
    return parser.parse_args(argv)


def _tell_done(manifest: ShardManifest) -> None:
    _tell("done", manifest=manifest.model_dump(mode="json"))
    sys.stdout.write(manifest.model_dump_json() + "\n")


def _tell(event: str, **more: Any) -> None:
    sys.stderr.write(json.dumps({"event": event, **more}) + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
