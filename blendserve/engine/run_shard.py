"""Runs shards of a plan, in a process of its own: `python -m blendserve.engine.run_shard PLAN_DIR [N]`.

With N it runs that shard. Without, it asks for one after the other, `{"event": "next"}` on stderr, and takes its number
as a line of stdin until that ends; the model stays loaded in between.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blendserve.engine.engine import LLMEngine
from blendserve.engine.shard_attempt import Progress as Progress
from blendserve.engine.shard_attempt import ShardAttempt
from blendserve.engine.shard_folder import ShardFolder
from blendserve.engine.shard_reader import max_completion_tokens
from blendserve.errors import BlendServeError, Interrupted, PlanError
from blendserve.manifest import PlanManifest, ShardManifest, ShardPlan, read_manifest

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
    runner = ShardRunner(plan_dir, [shard], should_stop=should_stop, on_progress=on_progress, completions=completions)
    return runner.run(shard)


class ShardRunner:
    """Runs shards of one plan, one after the other. The model is loaded when it is first needed, and kept."""

    def __init__(
        self,
        plan_dir: Path,
        shards: Sequence[int] | None,
        *,
        should_stop: Callable[[], bool],
        on_progress: Callable[[Progress], None] | None,
        completions: str | None = None,
    ) -> None:
        """shards: those that may come, None for all of the plan; the KV cache is made large enough for any of them.

        Raises PlanError for a bad plan or a shard that isn't in it.
        """
        self._plan_dir = plan_dir
        self._plan = plan = read_manifest(plan_dir / "plan.json", PlanManifest)
        self._coming = plan.shards if shards is None else tuple(self._find(shard) for shard in shards)
        self._should_stop = should_stop
        self._on_progress = on_progress
        self._completions = completions or str((plan_dir / plan.completions).resolve())
        self._engine: LLMEngine | None = None

    def run(self, shard: int) -> ShardManifest:
        """Run what is left of a shard; returns at once when nothing is.

        Raises Interrupted when `should_stop()` said so before the end; then all that was finished is written, and
        calling it again goes on. Raises InUseError when another process runs the shard or has taken it over; PlanError,
        ModelError, UsageError or OutputError for what plan, model, device or disk lack.
        """
        shard_plan = self._find(shard)
        folder = ShardFolder(f"{self._completions}/shard-{shard:05d}")
        if (finished := self._finished(folder)) is not None:
            return finished
        with folder.locked():
            if (finished := self._finished(folder)) is not None:  # by whom we waited for
                return finished
            folder.remove_manifest()  # of an earlier plan; its completions stay
            folder.take_over()
            attempt = ShardAttempt(self._plan_dir, self._plan, shard_plan, folder, self._on_progress)
            return attempt.run(self._loaded_engine, self._should_stop)

    def _find(self, shard: int) -> ShardPlan:
        for shard_plan in self._plan.shards:
            if shard_plan.shard == shard:
                return shard_plan
        raise PlanError(
            f"The plan in {self._plan_dir} has no shard {shard}. Expected 0 to {len(self._plan.shards) - 1}."
        )

    def _finished(self, folder: ShardFolder) -> ShardManifest | None:
        """The manifest of a shard that is done; that of an earlier plan doesn't count."""
        manifest = folder.read_manifest()
        return manifest if manifest is not None and manifest.plan_id == self._plan.plan_id else None

    def _loaded_engine(self) -> LLMEngine:
        """The engine. Prefixes that a shard leaves in its cache stay: the next may be a cut of the same subtree."""
        if self._engine is None:
            plan = self._plan
            useful_tokens = [
                shard.num_prompt_tokens + max_completion_tokens(self._plan_dir / shard.file) for shard in self._coming
            ]
            self._engine = LLMEngine(
                Path(plan.model),
                plan.engine,
                plan.sampling,
                max_useful_tokens=max(useful_tokens),
                max_requests=max(shard.num_requests for shard in self._coming),
            )
        return self._engine


class _Orders:
    """The shards' numbers that come in on stdin, asked for one at a time."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

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

    def __iter__(self) -> Iterator[int]:
        while True:
            _tell("next")
            line = self._lines.get()
            if line is None:
                return
            if not line.strip().isdigit():
                raise PlanError(f"Expected the number of a shard as a line of stdin, got {line!r}.")
            yield int(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Run shards as the command line says. Returns the exit status: 0 done, 130 stopped, else that of the error."""
    arguments = _parse(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    stop, signalled, orders = threading.Event(), threading.Event(), _Orders()

    def on_signal(*_: object) -> None:
        signalled.set()
        stop.set()
        orders.end()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    is_asking = arguments.shard is None
    if is_asking or arguments.stop_at_eof:
        on_end = stop.set if arguments.stop_at_eof else lambda: None
        threading.Thread(target=orders.read, args=(on_end,), daemon=True).start()
    try:
        runner = ShardRunner(
            arguments.plan_dir,
            None if is_asking else [arguments.shard],
            should_stop=stop.is_set,
            on_progress=lambda progress: _tell("progress", **asdict(progress)),
            completions=arguments.completions,
        )
        for shard in orders if is_asking else [arguments.shard]:
            manifest = runner.run(shard)
            _tell("done", manifest=manifest.model_dump(mode="json"))
            sys.stdout.write(manifest.model_dump_json() + "\n")
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


def _tell(event: str, **more: Any) -> None:
    sys.stderr.write(json.dumps({"event": event, **more}) + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
