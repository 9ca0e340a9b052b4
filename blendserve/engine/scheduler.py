"""What runs in the next step: all decodes, then prefill chunks, then newly admitted requests.

Knows no torch. A step is planned against a token budget and against the KV cache; what is planned will be run, in
order, so that the next step can be planned before this one's tokens are known.
"""

from __future__ import annotations

import numpy as np

from blendserve.dual_scanner import Front
from blendserve.engine.admission import AdmissionOrder, reason_against
from blendserve.engine.kv_cache import KVCache
from blendserve.engine.memory_forecast import MemoryForecast
from blendserve.engine.pace import Pace
from blendserve.engine.request import Request
from blendserve.engine.running import RunningRequests
from blendserve.engine.scheduled_batch import PrefillChunk, ScheduledBatch, TableChange
from blendserve.engine.upcoming import RequestSource, UpcomingRequests
from blendserve.known_lengths import KnownLengths
from blendserve.length_learning import LEARNT_REST_SHARE
from blendserve.step_tokens import LEAST_STEP_TOKENS, padded_tokens, prefill_tokens
from blendserve.timetable import Timetable, make_timetable

# What the forecast has no room for has none in the next steps either, unless a request ends: each grows by a token and
# has one less to go. So it is asked again after a few, for what may have changed beside that.
_REFUSED_STEPS = 8


class Scheduler:
    """Continuous batching: chunked prefill, prefix sharing, admission from two fronts, preemption by recompute."""

    def __init__(
        self,
        source: RequestSource,
        kv_cache: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        paced_tokens: int | None = None,
        weights_tokens: int = 0,
        running: RunningRequests | None = None,
        is_last: bool = True,
    ) -> None:
        """paced_tokens: where both overlap, the left front is prefilled at the pace of the running decodes, in steps of
        as many tokens or more, and the right one is admitted while steps lack memory work.

        weights_tokens: of KV cache, that take as long to read as the model's weights: a paced step has room for prompts
        meanwhile.

        running: what goes on from another source, all of it decoding and no step of it in flight. is_last: whether
        nothing will come after this source.
        """
        self._upcoming = UpcomingRequests(source)
        self._kv_cache = kv_cache
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self.running = running or RunningRequests(max_num_seqs)
        self._prefilling: list[int] = []  # rows, in the order of admission
        self._drained: list[tuple[int, int]] = []  # (row, serial): blocks to give back once their last step is planned
        self._pace: Pace | None = None
        if paced_tokens is not None and source.scanner.is_two_ended:
            self._pace = Pace(source.scanner, source.learner, least_tokens=paced_tokens, weights_tokens=weights_tokens)
        timetable = None
        if self._pace is None and source.scanner.is_two_ended and source.lengths is not None:
            timetable = self._make_timetable(source.lengths, is_last)
        self._waiting = AdmissionOrder(self._upcoming, self._pace, max_num_batched_tokens, timetable)
        self._prefill_budget = 0  # tokens of prompts that this step may still have
        self._num_steps = 0  # planned before this one
        self._next_admission = 0  # the step before which none is worth a try
        self._is_planned = np.zeros(max_num_seqs, dtype=np.bool_)  # into this step: these can't be preempted

    def _make_timetable(self, lengths: KnownLengths, is_last: bool) -> Timetable | None:
        """None where it would be of no use, or where its steps would have room for what comes after this source."""
        return make_timetable(
            lengths,
            capacity_tokens=self._capacity_tokens,
            block_size=self._kv_cache.block_size,
            max_num_seqs=len(self.running.requests),
            max_step_tokens=self._max_num_batched_tokens,
            least_step_tokens=0 if is_last else LEAST_STEP_TOKENS,
        )

    @property
    def num_waiting(self) -> int:
        return self._waiting.num_waiting

    @property
    def has_unfinished(self) -> bool:
        return self.running.num_rows > 0 or self.num_waiting > 0

    def schedule(self) -> ScheduledBatch:
        """Plan the next step."""
        batch = ScheduledBatch()
        self._is_planned[:] = False
        self._kv_cache.begin_step()
        self._release_drained()
        for row in self._upcoming.learn(self._num_steps, self.running, self._capacity_tokens):
            self._preempt(batch, row)
        needed_blocks = self.running.num_active + self._kv_cache.blocks_for(self._max_num_batched_tokens)
        if self._kv_cache.num_free_blocks <= needed_blocks and self._upcoming.has_moved(self._num_steps):
            self._kv_cache.pin(self._upcoming.ahead())
        self._schedule_decodes(batch)
        if self._pace:
            self._prefill_budget = self._pace.begin_step(self.running, len(batch.decode_rows))
        elif self._waiting.has_timetable:
            self._prefill_budget = 0
            self._admit(batch)  # those whose time has come
            self._prefill_budget = self._flexible_tokens(batch.num_tokens)
        else:
            self._prefill_budget = prefill_tokens(batch.num_tokens, self._max_num_batched_tokens)
        for row in list(self._prefilling):
            if row in self._prefilling and not self._is_planned[row]:  # not preempted meanwhile, nor admitted
                self._schedule_prefill(batch, row)
        self._admit(batch)
        self._plan_sampling(batch)
        batch.block_copies = self._kv_cache.take_copies()
        self._num_steps += 1
        return batch

    def finish(self, row: int, is_reusable: bool = True) -> Request:
        """Take a request that has ended out of its row; `is_reusable`: others may share what it has computed."""
        self._waiting.note_end(self.running.request(row), int(self.running.generated_tokens[row]))
        return self._take_out(row, is_reusable)

    def _take_out(self, row: int, is_reusable: bool = True) -> Request:
        self._next_admission = 0
        request = self.running.request(row)
        self._kv_cache.release(request)
        if not is_reusable:
            self._kv_cache.forget(request)
        if row in self._prefilling:
            self._prefilling.remove(row)
        self.running.free(row)
        return request

    def abort(self) -> None:
        """Drop all running and preempted requests and give their blocks back."""
        for row in np.flatnonzero(self.running.serials).tolist():
            self._take_out(row)
        self._waiting.clear()

    def begin_again(self, kv_cache: KVCache) -> None:
        """Take all running requests back, with the tokens that are known, and go on with another, empty cache."""
        rows = np.flatnonzero(self.running.serials)
        for row in rows[np.argsort(-self.running.serials[rows])].tolist():
            self._waiting.put_back(self._take_out(row))
        self._drained.clear()
        self._kv_cache = kv_cache

    def _release_drained(self) -> None:
        """Blocks of requests whose last step is planned: whatever is planned from now on runs behind it."""
        for row, serial in self._drained:
            if self.running.serials[row] == serial:
                self._kv_cache.release(self.running.request(row))
        self._drained.clear()

    def _schedule_decodes(self, batch: ScheduledBatch) -> None:
        running, serials = self.running, self.running.serials
        rows = running.decoding_rows()
        if len(rows) > self._max_num_batched_tokens:
            rows = rows[np.argsort(serials[rows])[: self._max_num_batched_tokens]]
        short = rows[running.context_tokens[rows] >= running.room_tokens[rows]]
        is_left_out = np.zeros_like(running.is_decoding)
        for row in short[np.argsort(serials[short])].tolist():
            if running.is_decoding[row]:  # not preempted meanwhile
                context = int(running.context_tokens[row])
                if self._outgrows_cache(context + 1) and running.known_tokens[row] < running.generated_tokens[row]:
                    is_left_out[row] = True  # the token that is on its way may be its last
                elif self._make_room(batch, row, context, context + 1) > context:
                    self._is_planned[row] = True
        rows = rows[running.is_decoding[rows] & ~is_left_out[rows]]
        self._is_planned[rows] = True
        batch.decode_rows = rows
        batch.decode_positions = running.context_tokens[rows]
        running.context_tokens[rows] += 1

    def _schedule_prefill(self, batch: ScheduledBatch, row: int) -> None:
        request = self.running.request(row)
        budget = self._max_num_batched_tokens - batch.num_tokens
        if self._pace or request.front is Front.LEFT:
            budget = min(budget, self._prefill_budget)
        if budget <= 0:
            return
        num_shared = self._kv_cache.take_cached_blocks(request)
        if request.num_preemptions == 0:  # what a preempted request finds again are its own tokens, no savings
            request.num_cached_tokens += num_shared
            batch.num_cached_tokens += num_shared
        self.running.shared_tokens[row] += num_shared
        start = request.num_computed_tokens
        end = min(start + budget, request.num_prefill_tokens)
        end = min(end, self._make_room(batch, row, start, end))
        if not self.running.is_active[row] or end <= start:
            return
        self._kv_cache.share_prompt_blocks(request, end)
        is_last = end == request.num_prefill_tokens
        batch.prefills.append(PrefillChunk(request, row, start, end - start, is_last))
        batch.num_prefill_tokens += end - start
        self._prefill_budget -= end - start
        request.num_computed_tokens = end
        self.running.context_tokens[row] = end
        self._is_planned[row] = True
        if is_last:
            self._prefilling.remove(row)
            self.running.is_decoding[row] = True

    def _plan_sampling(self, batch: ScheduledBatch) -> None:
        running = self.running
        completed = np.array([chunk.row for chunk in batch.prefills if chunk.is_last], dtype=np.int64)
        rows = batch.sampled_rows = np.concatenate((batch.decode_rows, completed))
        batch.sampled_serials = running.serials[rows]
        batch.sampled_positions = running.generated_tokens[rows]
        batch.sampled_seeds = running.seeds[rows]
        drained = running.plan_token(rows)
        self._drained += zip(drained.tolist(), running.serials[drained].tolist(), strict=True)

    def _make_room(self, batch: ScheduledBatch, row: int, num_computed: int, num_tokens: int) -> int:
        """Give a row blocks for `num_tokens` tokens, or for what there is when that is at least one more token.

        Preempts the latest admitted requests when the cache is full, in the end this one, or fails it when it outgrows
        the whole cache. Returns the tokens that it has room for. num_computed: tokens that are stored already.
        """
        request = self.running.request(row)
        if self._outgrows_cache(num_computed + 1):
            reason = (
                f"prompt and completion have reached {num_computed + 1} tokens; the KV cache holds "
                f"{self._capacity_tokens}. Raise num_blocks or lower max_tokens"
            )
            batch.failed.append((self.finish(row), reason))
            return 0
        while True:
            room = self._kv_cache.extend(request, num_tokens)
            if room > num_computed:
                self.running.room_tokens[row] = room
                self._note_blocks(batch, row, request)
                return room
            victim = self._latest_unplanned()
            self._preempt(batch, victim)
            if victim == row:
                return 0

    def _outgrows_cache(self, num_tokens: int) -> bool:
        """Whether a request of so many tokens finds no room even alone."""
        return self._kv_cache.blocks_for(num_tokens) > self._kv_cache.num_blocks

    def _note_blocks(self, batch: ScheduledBatch, row: int, request: Request) -> None:
        first = request.num_synced_blocks
        if first < len(request.block_table):
            batch.table_changes.append(TableChange(row, first, request.block_table[first:]))
            request.num_synced_blocks = len(request.block_table)

    def _latest_unplanned(self) -> int:
        rows = np.flatnonzero(self.running.is_active & ~self._is_planned)
        return int(rows[np.argmax(self.running.serials[rows])])

    def _preempt(self, batch: ScheduledBatch, row: int) -> None:
        """Take a request back; a token of it that isn't known yet will be sampled again."""
        self._waiting.put_back(self._take_out(row))
        batch.num_preempted += 1

    def _admit(self, batch: ScheduledBatch) -> None:
        """Admit requests while budget, rows and expected memory last; preempted ones come first."""
        if self.num_waiting == 0 or not self.running.has_free_row:
            return
        self._waiting.begin_step(self._capacity_tokens)
        if self._num_steps < self._next_admission:
            return
        forecast = self._forecast()
        while self.running.has_free_row and batch.num_tokens < self._max_num_batched_tokens:
            if not self._admit_one(batch, forecast):
                return

    def _admit_one(self, batch: ScheduledBatch, forecast: MemoryForecast) -> bool:
        """Admit the first candidate that fits, or fail one that never will. False when there is none to admit now."""
        was_refused, may_wait = False, self._pace is None and self._prefill_budget > 0
        candidates = self._waiting.candidates(
            forecast, self._capacity_tokens, step=self._num_steps, prefill_budget=self._prefill_budget
        )
        for candidate in candidates:
            request = candidate.request
            reason = reason_against(request, self._max_model_len, self._kv_cache)
            if reason is not None:
                self._waiting.take(candidate)
                batch.failed.append((request, reason))
                return True
            if self._kv_cache.should_wait(request):
                may_wait = False
                continue
            num_cached, num_revived = self._kv_cache.count_cached_tokens(request)
            # With nothing running the whole cache is free, so the request fits whatever the forecast says.
            if not forecast.is_empty and not forecast.fits(request, num_cached, num_revived, candidate.room_tokens):
                was_refused = True
                continue
            self._waiting.take(candidate)
            row = self._start(request)
            self._schedule_prefill(batch, row)
            if not self.running.is_active[row]:  # preempted at once: the forecast was too hopeful
                return False
            if self._pace and candidate.front is not None:
                self._pace.admit(request, int(self.running.shared_tokens[row]))
            forecast.add(request, num_cached, num_revived)
            return True
        if was_refused and may_wait:
            self._next_admission = self._num_steps + _REFUSED_STEPS
        return False

    def _flexible_tokens(self, num_tokens: int) -> int:
        """By the timetable, how many tokens a step of `num_tokens` should have beside them."""
        rows = self.running.active_rows()
        unprefilled = np.maximum(self.running.prefill_tokens[rows] - self.running.context_tokens[rows], 0)
        unfinished = int(unprefilled.sum() + self.running.remaining_output_tokens(rows).sum()) + num_tokens
        step_tokens = self._waiting.step_tokens(self._num_steps, unfinished)
        return max(step_tokens, padded_tokens(num_tokens)) - num_tokens

    def _start(self, request: Request) -> int:
        request.num_prefill_tokens = request.num_tokens
        row = self.running.admit(request, min(request.max_tokens, self._max_model_len - request.num_prompt_tokens))
        self._prefilling.append(row)
        return row

    def _forecast(self) -> MemoryForecast:
        rows = self.running.active_rows()
        unfilled = self.running.room_tokens[rows] - self.running.context_tokens[rows]
        return MemoryForecast(
            self.running,
            num_used_tokens=self._kv_cache.num_used_blocks * self._kv_cache.block_size - int(unfilled.sum()),
            capacity_tokens=self._capacity_tokens,
            block_size=self._kv_cache.block_size,
            rest_share=1.0 if self._upcoming.learner is None else LEARNT_REST_SHARE,
        )

    @property
    def _capacity_tokens(self) -> int:
        return self._kv_cache.num_blocks * self._kv_cache.block_size
