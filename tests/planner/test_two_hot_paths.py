"""Two fronts are two hot paths in the prefix cache: both are spared, where plain least recently used loses one."""

from __future__ import annotations

from blendserve.engine.kv_cache import KVCache
from blendserve.engine.upcoming import UpcomingRequests
from tests.engine.engine_runs import ListSource, stated_requests

BLOCK_SIZE, PREFIX = 4, 16
LEFT, RIGHT, PASSING = [1] * PREFIX, [2] * PREFIX, [3] * PREFIX


def passes_through(cache: KVCache, source: ListSource, position: int) -> None:
    """A request computes its prompt, leaves it in the cache and is gone."""
    request = source.request(position)
    request.num_prefill_tokens = request.num_prompt_tokens
    cache.take_cached_blocks(request)
    assert cache.extend(request, request.num_prompt_tokens) >= request.num_prompt_tokens
    cache.share_prompt_blocks(request, request.num_prompt_tokens)
    cache.release(request)


def test_neither_front_loses_its_prefix_to_what_came_later():
    stated = stated_requests([[*LEFT, 7], [*RIGHT, 8], [*PASSING, 9], [4] * 30], 2)
    cache = KVCache(16, BLOCK_SIZE, True)
    everyone = ListSource(stated)
    for position in (1, 0, 2):  # the right front's prefix is the oldest
        passes_through(cache, everyone, position)
    fronts = ListSource([stated[0], stated[1]], is_two_ended=True)
    cache.begin_step()
    cache.pin(UpcomingRequests(fronts).ahead())
    passes_through(cache, everyone, 3)  # needs room
    kept = [cache.count_cached_tokens(everyone.request(position))[0] for position in range(3)]
    assert kept[:2] == [PREFIX, PREFIX]
    assert kept[2] < PREFIX
