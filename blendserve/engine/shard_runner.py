"""Runs shards of one plan on one engine: the next one's requests begin beside the last long outputs of the one before.

Each shard keeps its folder locked from its first request to its last, writes its own completions, and is published when
the last of them is written. A step counts for the shard that began last of those that aren't through.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Protocol

from blendserve.engine.engine import LLMEngine
from blendserve.engine.request import Completion, Request
from blendserve.engine.shard_attempt import Progress, ShardAttempt
from blendserve.engine.shard_folder import ShardFolder
from blendserve.engine.shard_reader import ShardReader, max_completion_tokens
from blendserve.engine.step_metrics import StepMetrics
from blendserve.errors import Interrupted, InUseError, PlanError
from blendserve.manifest import PlanManifest, ShardManifest, ShardPlan, read_manifest

log = logging.getLogger(__name__)


class Orders(Protocol):
    """Says which shard is next."""

    def wait(self) -> int | None:
        """The next shard; None when no more come."""
        ...

    def poll(self) -> int | None:
        """The next shard if it is known already."""
        ...


class ShardRunner:
    """Takes shards as they are ordered. The model is loaded when it is first needed, and kept."""

    def __init__(
        self,
        plan_dir: Path,
        shards: Sequence[int] | None,
        *,
        should_stop: Callable[[], bool],
        on_done: Callable[[ShardManifest], None],
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
        self._on_done = on_done
        self._on_progress = on_progress
        self._completions = completions or str((plan_dir / plan.completions).resolve())
        self._engine: LLMEngine | None = None
        self._open: dict[ShardAttempt, ExitStack] = {}  # in the order of their beginning, and what ends them
        self._in_use: deque[int] = deque()  # ordered, and left until those that run are through

    def run(self, orders: Orders) -> None:
        """Run what is left of each shard that `orders` names; one of which nothing is left is told of at once.

        Raises Interrupted when `should_stop()` said so before the end; then all that was finished is written, and
        another call goes on. Raises InUseError when another process has taken a shard over, or has one when all others
        are through; PlanError, ModelError, UsageError or OutputError for what plan, model, device or disk lack.
        """
        try:
            while (shard := self._in_use.popleft() if self._in_use else orders.wait()) is not None:
                attempt = self._begin(shard)
                if attempt is not None:
                    self._run_engine(attempt, orders)
        finally:
            with ExitStack() as ends:
                for end in self._open.values():
                    ends.enter_context(end)
                self._open.clear()

    def _run_engine(self, attempt: ShardAttempt, orders: Orders) -> None:
        """Until nothing runs and no other shard is known."""
        self._loaded_engine().run(
            attempt.reader,
            on_finished=self._take,
            on_step=self._note,
            should_stop=lambda: self._should_stop() or any(attempt.is_lost for attempt in self._open),
            next_source=partial(self._next_source, orders) if len(self._coming) > 1 else None,
        )
        if self._open:
            states = " ".join(attempt.state for attempt in self._open)
            raise Interrupted(f"{states} They are written; run again to go on.")

    def _next_source(self, orders: Orders) -> Callable[[Sequence[Request]], ShardReader | None] | None:
        """What opens the next shard. A GPU that holds a whole small shard at one time leaves others to other GPUs."""
        if not all(attempt.is_half_through for attempt in self._open):
            return None
        shard = orders.poll()
        return None if shard is None else partial(self._open_source, shard)

    def _open_source(self, shard: int, guests: Sequence[Request]) -> ShardReader | None:
        try:
            attempt = self._begin(shard, guests)
        except InUseError as error:
            log.info("%s Shard %d is left until those that run are through.", error, shard)
            self._in_use.append(shard)
            return None
        if attempt is None:
            return None
        attempt.reader.place(guests)
        return attempt.reader

    def _begin(self, shard: int, guests: Sequence[Request] = ()) -> ShardAttempt | None:
        """Open a shard; None when nothing of it was left to run."""
        shard_plan = self._find(shard)
        folder = ShardFolder(f"{self._completions}/shard-{shard:05d}")
        if self._was_finished(folder):
            return None
        with ExitStack() as end:
            end.enter_context(folder.locked(is_waiting=not self._open))
            if self._was_finished(folder):  # by whom we waited for
                return None
            folder.remove_manifest()  # of an earlier plan; its completions stay
            folder.take_over()
            attempt = ShardAttempt(
                self._plan_dir, self._plan, shard_plan, folder, on_progress=self._on_progress, guests=guests
            )
            end.callback(attempt.flush)
            earlier = list(self._open)
            self._open[attempt] = end.pop_all()
        if not attempt.is_complete:
            for other in earlier:
                other.yield_steps()
            return attempt
        self._publish(attempt)
        return None

    def _was_finished(self, folder: ShardFolder) -> bool:
        """Whether a shard is done, of which is told then; the manifest of an earlier plan doesn't count."""
        manifest = folder.read_manifest()
        if manifest is None or manifest.plan_id != self._plan.plan_id:
            return False
        self._on_done(manifest)
        return True

    def _publish(self, attempt: ShardAttempt) -> None:
        with self._open.pop(attempt):
            manifest = attempt.publish()
        self._on_done(manifest)

    def _take(self, completion: Completion) -> None:
        attempt = next(attempt for attempt in self._open if attempt.reader.has(completion.row_index))
        attempt.add(completion)
        if attempt.is_complete:
            self._publish(attempt)

    def _note(self, metrics: StepMetrics) -> None:
        if self._open:  # else nothing has come of the step: it was on its way when the last request ended
            list(self._open)[-1].add_step(metrics)
        for attempt in self._open:
            attempt.write_due()

    def _find(self, shard: int) -> ShardPlan:
        for shard_plan in self._plan.shards:
            if shard_plan.shard == shard:
                return shard_plan
        raise PlanError(
            f"The plan in {self._plan_dir} has no shard {shard}. Expected 0 to {len(self._plan.shards) - 1}."
        )

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
