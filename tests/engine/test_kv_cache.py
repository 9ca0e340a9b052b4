"""The KV cache's books: blocks are never lost or doubled, prefixes are found exactly, used blocks are never evicted."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from blendserve.engine.kv_cache import KVCache
from blendserve.engine.radix_tree import RadixTree
from blendserve.engine.request import Request

BLOCK_SIZE = 2
NUM_BLOCKS = 9
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=11)  # few tokens, so that prefixes meet
PATHS = st.lists(st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=5), max_size=12)


def make_request(prompt: list[int], position: int = 0) -> Request:
    request = Request(
        position=position,
        row_index=position,
        request_id=str(position),
        prompt_token_ids=np.array(prompt, dtype=np.int32),
        max_tokens=8,
        estimated_output_tokens=8,
    )
    request.num_prefill_tokens = len(prompt)
    return request


def insert_path(tree: RadixTree, path: list[bytes], next_block: int) -> int:
    """Insert what is missing of a path, unreferenced afterwards. Returns the next free block number."""
    nodes = tree.match(path)
    for node in nodes:
        if not node.is_referenced:
            tree.set_referenced(node)
    for key in path[len(nodes) :]:
        nodes.append(tree.insert(nodes[-1] if nodes else tree.root, key, next_block))
        next_block += 1
    for node in reversed(nodes):
        tree.set_unreferenced(node)
    return next_block


@given(inserted=PATHS, asked=PATHS)
def test_match_gives_the_longest_inserted_prefix(inserted: list[list[bytes]], asked: list[list[bytes]]) -> None:
    tree, next_block = RadixTree(), 0
    for path in inserted:
        next_block = insert_path(tree, path, next_block)
    known = {tuple(path[:length]) for path in inserted for length in range(1, len(path) + 1)}
    assert tree.num_nodes == tree.num_unreferenced == len(known)
    for path in asked:
        longest = max((length for length in range(1, len(path) + 1) if tuple(path[:length]) in known), default=0)
        nodes = tree.match(path)
        assert [node.key for node in nodes] == path[:longest]
    tree.check_integrity()


@given(paths=PATHS)
def test_eviction_gives_up_every_unused_block_once(paths: list[list[bytes]]) -> None:
    tree, next_block = RadixTree(), 0
    for path in paths:
        next_block = insert_path(tree, path, next_block)
    evicted = []
    while (block := tree.evict()) is not None:
        evicted.append(block)
        tree.check_integrity()
    assert sorted(evicted) == list(range(next_block))


@given(
    keys=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=12, unique_by=tuple),
    asked=st.lists(st.integers(0, 2), min_size=1, max_size=6),
)
def test_nearest_gives_the_child_that_agrees_longest(keys: list[list[int]], asked: list[int]) -> None:
    tree = RadixTree()
    for block, key in enumerate(keys):
        tree.insert(tree.root, np.array(key, dtype=np.int32).tobytes(), block, planned_in=block % 2)
    asked_key = np.array(asked, dtype=np.int32).tobytes()
    found = dict(tree.nearest(tree.root, asked_key, unit_bytes=4, min_units=1, before_step=1))

    def agreement(key: list[int]) -> int:
        return next((n for n, (a, b) in enumerate(zip(key, asked, strict=False)) if a != b), min(len(key), len(asked)))

    for is_ready in (True, False):
        expected = max((agreement(key) for block, key in enumerate(keys) if block % 2 == 0 or not is_ready), default=0)
        counted = [num_tokens for node, num_tokens in found.items() if node.planned_in == 0 or not is_ready]
        assert max(counted, default=0) == expected
    for node, num_tokens in found.items():
        assert num_tokens == agreement(keys[node.block])


def test_the_longest_unused_prefix_is_evicted_first() -> None:
    tree = RadixTree()
    for number, path in enumerate(([b"a", b"b"], [b"c"], [b"d"])):
        insert_path(tree, path, 10 * number)
    insert_path(tree, [b"a", b"b"], 99)  # used again
    assert [tree.evict() for _ in range(5)] == [10, 20, 1, 0, None]


def test_pinned_prefixes_are_evicted_last() -> None:
    tree = RadixTree()
    for number, path in enumerate(([b"a", b"b"], [b"c"], [b"d"])):
        insert_path(tree, path, 10 * number)
    tree.pin([*tree.match([b"a", b"b", b"x"]), *tree.match([b"d"])])
    assert tree.evict() == 10
    tree.pin(tree.match([b"a"]))  # from now on only this one
    assert [tree.evict() for _ in range(4)] == [20, 1, 0, None]


def test_a_prefix_in_use_is_not_evicted() -> None:
    tree = RadixTree()
    insert_path(tree, [b"a", b"b"], 0)
    tree.set_referenced(tree.match([b"a"])[0])
    assert [tree.evict(), tree.evict()] == [1, None]


def test_what_is_not_fit_to_be_shared_is_forgotten_unless_someone_uses_it() -> None:
    cache = KVCache(NUM_BLOCKS, BLOCK_SIZE, has_prefix_cache=True)
    requests = [make_request([1, 1, 1, 1, number, number]) for number in range(2)]
    for request in requests:
        cache.take_cached_blocks(request)
        cache.extend(request, 6)
        cache.share_prompt_blocks(request, 6)
    cache.release(requests[0])
    cache.forget(requests[0])
    assert cache.count_cached_tokens(make_request([1, 1, 1, 1, 0, 0, 0])) == (4, 0)
    cache.release(requests[1])
    cache.forget(requests[1])
    assert cache.count_cached_tokens(make_request([1, 1, 1, 1, 1, 1, 1])) == (0, 0)
    assert cache.num_free_blocks == NUM_BLOCKS


def cache_of(*prompts: list[int], num_blocks: int) -> KVCache:
    """Blocks of four tokens; the prompts have been computed one after the other and are not in use any more."""
    cache = KVCache(num_blocks, 4, has_prefix_cache=True, min_copied_tokens=1)
    for prompt in prompts:
        cache.begin_step()
        begin(cache, prompt)
        cache.take_copies()
    return cache


def begin(cache: KVCache, prompt: list[int], *, is_kept: bool = False) -> Request:
    request = make_request(prompt)
    cache.take_cached_blocks(request)
    cache.extend(request, len(prompt))
    cache.share_prompt_blocks(request, len(prompt))
    if not is_kept:
        cache.release(request)
    return request


def test_no_copy_writes_what_another_of_its_step_reads() -> None:
    cache = cache_of([1, 1, 2, 2], [3, 3, 4, 4], num_blocks=3)
    cache.begin_step()
    first = make_request([1, 1, 9])
    assert cache.take_cached_blocks(first) == 2
    second = make_request([3, 3, 9])  # for which the block that the first one copies has to go
    assert cache.take_cached_blocks(second) == 0
    copy = cache.take_copies()[0]
    assert (copy.target, copy.num_tokens) == (first.block_table[0], 2)
    assert second.block_table == [copy.source]


def test_a_block_is_in_use_when_it_is_copied() -> None:
    cache = cache_of([1, 1, 2, 2], [3, 3, 4, 4], [1, 1, 9], num_blocks=3)
    cache.begin_step()
    begin(cache, [5, 5, 5, 5], is_kept=True)  # room for one of the first two
    assert cache.count_cached_tokens(make_request([1, 1, 2, 2, 0])) == (4, 4)
    assert cache.count_cached_tokens(make_request([3, 3, 4, 4, 0])) == (0, 0)


class KVCacheMachine(RuleBasedStateMachine):
    """Requests come, compute some of their prompt, and leave in any order, on a cache too small for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(NUM_BLOCKS, BLOCK_SIZE, has_prefix_cache=True, min_copied_tokens=1)
        self.running: list[Request] = []
        self.num_made = 0
        self.content: dict[int, tuple[int, ...]] = {}  # block → the tokens up to its end, once it is shared

    @rule(prompt=PROMPTS)
    def come(self, prompt: list[int]) -> None:
        request = make_request(prompt, self.num_made)
        self.num_made += 1
        num_expected, _ = self.cache.count_cached_tokens(request)
        self.take(request)
        assert num_expected <= request.num_computed_tokens < min(num_expected + BLOCK_SIZE, len(prompt))
        self.running.append(request)

    def take(self, request: Request) -> None:
        self.cache.begin_step()
        self.cache.take_cached_blocks(request)
        prompt, num_computed = request.prompt_token_ids.tolist(), request.num_computed_tokens
        for index, block in enumerate(request.block_table[: request.num_tree_blocks]):
            assert self.content[block] == tuple(prompt[: (index + 1) * BLOCK_SIZE])
        for copy in self.cache.take_copies():
            assert copy.target == request.block_table[-1] and copy.num_tokens == num_computed % BLOCK_SIZE
            assert self.content[copy.source][:num_computed] == tuple(prompt[:num_computed])

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num_tokens=st.integers(1, 5))
    def compute(self, data: st.DataObject, num_tokens: int) -> None:
        request = data.draw(st.sampled_from(self.running))
        self.take(request)
        end = min(request.num_computed_tokens + num_tokens, request.num_prompt_tokens)
        end = min(end, self.cache.extend(request, end))
        if end <= request.num_computed_tokens:
            assert end == request.num_prompt_tokens or self.cache.num_used_blocks == NUM_BLOCKS
            return
        self.cache.share_prompt_blocks(request, end)
        request.num_computed_tokens = end
        assert request.num_tree_blocks * BLOCK_SIZE <= end, "a block is shared before it is full"
        for index in range(request.num_tree_blocks):
            tokens = tuple(request.prompt_token_ids[: (index + 1) * BLOCK_SIZE].tolist())
            self.content[request.block_table[index]] = tokens
        if end == request.num_prompt_tokens and request.num_tree_blocks < len(request.block_table):
            self.content[request.block_table[request.num_tree_blocks]] = tuple(request.prompt_token_ids.tolist())

    @precondition(lambda self: self.running)
    @rule(data=st.data(), is_reusable=st.booleans())
    def leave(self, data: st.DataObject, is_reusable: bool) -> None:
        request = data.draw(st.sampled_from(self.running))
        self.running.remove(request)
        self.cache.release(request)
        if not is_reusable:
            self.cache.forget(request)

    @rule(prompts=st.lists(PROMPTS, max_size=3))
    def pin(self, prompts: list[list[int]]) -> None:
        self.cache.pin(make_request(prompt) for prompt in prompts)

    @invariant()
    def books_balance(self) -> None:
        self.cache.check_integrity(self.running)
        held = {block for request in self.running for block in request.block_table}
        assert self.cache.num_used_blocks == len(held)

    def teardown(self) -> None:
        for request in self.running:
            self.cache.release(request)
        self.cache.check_integrity(())
        assert self.cache.num_used_blocks == 0


TestKVCache = KVCacheMachine.TestCase
TestKVCache.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
