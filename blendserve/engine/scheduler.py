"""What runs in the next step: all decodes, then prefill chunks, then newly admitted requests.

Knows no torch. A step is planned against a token budget and against the KV cache; what is planned will be run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from blendserve.dual_scanner import DualScanner, Front
from blendserve.engine.admission import MemoryForecast
from blendserve.engine.kv_cache import KVCache
from blendserve.engine.request import Request

# Upcoming requests at each front whose cached prefixes are spared from eviction, and how many steps that view may age:
# where the fronts have moved since, and where they haven't.
_PIN_AHEAD = 16
_PIN_AGE_STEPS = 4
_PIN_MAX_AGE_STEPS = 32


class RequestSource(Protocol):
    """Where requests come from: the order of admission, and the requests by their position in it."""

    @property
    def scanner(self) -> DualScanner: ...

    @property
    def is_two_ended(self) -> bool: ...

    def request(self, position: int) -> Request: ...


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """The next `num_tokens` tokens of a request's prompt, from its num_computed_tokens on."""

    request: Request
    num_tokens: int

    @property
    def is_last(self) -> bool:
        """Whether the prompt is complete with this chunk, so that its first token is sampled."""
        return self.request.num_computed_tokens + self.num_tokens == self.request.num_prefill_tokens


@dataclass(slots=True)
class ScheduledBatch:
    """One step: requests that decode one token each, and prefill chunks. `failed`: requests that can never run, why."""

    decodes: list[Request] = field(default_factory=list)
    prefills: list[PrefillChunk] = field(default_factory=list)
    failed: list[tuple[Request, str]] = field(default_factory=list)
    num_prefill_tokens: int = 0
    num_cached_tokens: int = 0
    num_preempted: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + self.num_prefill_tokens

    @property
    def sampled(self) -> list[Request]:
        """The requests that get a token from this step, in the order of their logits."""
        return self.decodes + [chunk.request for chunk in self.prefills if chunk.is_last]


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
    ) -> None:
        self._source = source
        self._kv_cache = kv_cache
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self.running: list[Request] = []  # in the order of admission
        self._preempted: deque[Request] = deque()
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))
        self._upcoming: dict[int, Request] = {}  # requests read ahead of their admission, by position
        self._pinned_at: tuple[int, int] = (-1, -_PIN_AGE_STEPS)  # num_remaining then, step then
        self._num_steps = 0
        self._scheduled: set[int] = set()  # positions planned into this step: these can't be preempted

    @property
    def num_waiting(self) -> int:
        return self._source.scanner.num_remaining + len(self._preempted)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.running) or self.num_waiting > 0

    def schedule(self) -> ScheduledBatch:
        """Plan the next step."""
        batch = ScheduledBatch()
        self._scheduled.clear()
        self._num_steps += 1
        self._pin_upcoming()
        for request in list(self.running):
            if request.row is not None and not request.is_prefilling:
                self._schedule_decode(batch, request)
        for request in list(self.running):
            if request.row is not None and request.is_prefilling:
                self._schedule_prefill(batch, request)
        self._admit(batch)
        return batch

    def finish(self, request: Request, is_reusable: bool = True) -> None:
        """Take a running request out. `is_reusable`: whether other requests may share what it has computed."""
        self.running.remove(request)
        self._release(request, is_reusable)

    def abort(self) -> None:
        """Drop all running and preempted requests and give their blocks back."""
        for request in list(self.running):
            self.finish(request)
        self._preempted.clear()

    def _schedule_decode(self, batch: ScheduledBatch, request: Request) -> None:
        if batch.num_tokens >= self._max_num_batched_tokens:
            return
        if self._make_room(batch, request, request.num_tokens) >= request.num_tokens:
            batch.decodes.append(request)
            self._scheduled.add(request.position)

    def _schedule_prefill(self, batch: ScheduledBatch, request: Request) -> None:
        budget = self._max_num_batched_tokens - batch.num_tokens
        if budget <= 0:
            return
        num_shared = self._kv_cache.take_cached_blocks(request)
        if request.num_preemptions == 0:  # what a preempted request finds again are its own tokens, no savings
            request.num_cached_tokens += num_shared
            batch.num_cached_tokens += num_shared
        request.num_shared_tokens += num_shared
        start = request.num_computed_tokens
        end = min(start + budget, request.num_prefill_tokens)
        end = min(end, self._make_room(batch, request, end))
        if request.row is None or end <= start:
            return
        self._kv_cache.share_prompt_blocks(request, end)
        batch.prefills.append(PrefillChunk(request, end - start))
        batch.num_prefill_tokens += end - start
        self._scheduled.add(request.position)

    def _make_room(self, batch: ScheduledBatch, request: Request, num_tokens: int) -> int:
        """Give `request` blocks for `num_tokens` tokens, or for what there is when that is at least one more token.

        Preempts the latest admitted requests when the cache is full, in the end `request` itself, or fails it when it
        outgrows the whole cache. Returns the tokens that it has room for.
        """
        if self._kv_cache.blocks_for(request.num_computed_tokens + 1) > self._kv_cache.num_blocks:
            reason = (
                f"prompt and completion have reached {request.num_tokens} tokens; the KV cache holds "
                f"{self._capacity_tokens}. Raise num_blocks or lower max_tokens"
            )
            self.finish(request)
            batch.failed.append((request, reason))
            return 0
        while True:
            room = self._kv_cache.extend(request, num_tokens)
            if room > request.num_computed_tokens:
                return room
            victim = next(other for other in reversed(self.running) if other.position not in self._scheduled)
            self._preempt(batch, victim)
            if victim is request:
                return 0

    def _preempt(self, batch: ScheduledBatch, request: Request) -> None:
        self.finish(request)
        request.num_preemptions += 1
        batch.num_preempted += 1
        self._preempted.appendleft(request)

    def _admit(self, batch: ScheduledBatch) -> None:
        """Admit requests while budget, rows and expected memory last; preempted ones come first."""
        if self.num_waiting == 0 or not self._free_rows:
            return
        forecast = self._forecast()
        while self._free_rows and batch.num_tokens < self._max_num_batched_tokens:
            if not self._admit_one(batch, forecast):
                return

    def _admit_one(self, batch: ScheduledBatch, forecast: MemoryForecast) -> bool:
        """Admit the first candidate that fits, or fail one that never will. False when there is none to admit now."""
        for request, front in self._candidates(forecast):
            reason = self._reason_against(request)
            if reason is not None:
                self._take(request, front)
                batch.failed.append((request, reason))
                return True
            num_cached, num_revived = self._kv_cache.count_cached_tokens(request)
            # With nothing running the whole cache is free, so the request fits whatever the forecast says.
            if self.running and not forecast.fits(request, num_cached, num_revived):
                continue
            self._take(request, front)
            self._start(request)
            self._schedule_prefill(batch, request)
            if request.row is None:  # preempted at once: the forecast was too hopeful
                return False
            forecast.add(request, num_cached, num_revived)
            return True
        return False

    def _candidates(self, forecast: MemoryForecast) -> Iterator[tuple[Request, Front | None]]:
        """What may be admitted next and the front it stands at, the best first; a preempted request stands at none.

        Long requests from the right wait until much of the cache is free. Meanwhile the left goes on, as far as its
        share and one step's prefill reach: otherwise the step would have memory work only, and beyond that the right
        would never find room.
        """
        if self._preempted:
            yield self._preempted[0], None
            return
        scanner, held, capacity = self._source.scanner, forecast.footprint_tokens, float(self._capacity_tokens)
        front = scanner.next_front(held[Front.LEFT], held[Front.RIGHT], capacity)
        if front is None:
            return
        yield self._read(scanner.peek(front)), front
        if front is Front.RIGHT and held[Front.LEFT] < scanner.left_share * capacity + self._max_num_batched_tokens:
            yield self._read(scanner.peek(Front.LEFT)), Front.LEFT

    def _take(self, request: Request, front: Front | None) -> None:
        if front is None:
            self._preempted.popleft()
            return
        request.front = front
        self._upcoming.pop(self._source.scanner.take(front), None)

    def _start(self, request: Request) -> None:
        request.row = self._free_rows.pop()
        request.num_prefill_tokens = request.num_tokens
        request.num_shared_tokens = 0
        request.max_tokens = min(request.max_tokens, self._max_model_len - request.num_prompt_tokens)
        self.running.append(request)

    def _reason_against(self, request: Request) -> str | None:
        """Why a request can never run, or None."""
        num_tokens = request.num_prompt_tokens
        if num_tokens == 0:
            return "the prompt is empty: it has no tokens"
        if num_tokens >= self._max_model_len:
            return (
                f"the prompt has {num_tokens} tokens; with at least one for the completion the context of "
                f"{self._max_model_len} tokens is exceeded"
            )
        if self._kv_cache.blocks_for(num_tokens) > self._kv_cache.num_blocks:
            return f"the prompt has {num_tokens} tokens; the KV cache holds {self._capacity_tokens}. Raise num_blocks"
        return None

    def _forecast(self) -> MemoryForecast:
        return MemoryForecast(
            self.running,
            num_used_tokens=self._kv_cache.num_used_blocks * self._kv_cache.block_size,
            capacity_tokens=self._capacity_tokens,
        )

    @property
    def _capacity_tokens(self) -> int:
        return self._kv_cache.num_blocks * self._kv_cache.block_size

    def _release(self, request: Request, is_reusable: bool) -> None:
        if request.row is not None:
            self._free_rows.append(request.row)
        request.row = None
        self._kv_cache.release(request, is_reusable)

    def _read(self, position: int) -> Request:
        if position not in self._upcoming:
            self._upcoming[position] = self._source.request(position)
        return self._upcoming[position]

    def _pin_upcoming(self) -> None:
        """When blocks are scarce, tell the cache which prompts will be admitted next from either front."""
        pinned_remaining, pinned_step = self._pinned_at
        num_remaining = self._source.scanner.num_remaining
        needed_blocks = len(self.running) + self._kv_cache.blocks_for(self._max_num_batched_tokens)
        max_age = _PIN_MAX_AGE_STEPS if pinned_remaining == num_remaining else _PIN_AGE_STEPS
        if self._num_steps - pinned_step < max_age or self._kv_cache.num_free_blocks > needed_blocks:
            return
        self._pinned_at = (num_remaining, self._num_steps)
        self._kv_cache.pin(self._read(position) for position in self._upcoming_positions())

    def _upcoming_positions(self) -> Iterator[int]:
        num_remaining = self._source.scanner.num_remaining
        if num_remaining == 0:
            return
        left, right = self._source.scanner.peek(Front.LEFT), self._source.scanner.peek(Front.RIGHT)
        yield from range(left, min(left + _PIN_AHEAD, right + 1))
        if self._source.is_two_ended:
            yield from range(right, max(right - _PIN_AHEAD, left + _PIN_AHEAD - 1), -1)
