"""The paged KV cache's bookkeeping: which request holds which blocks, and which prompt prefixes are shared.

Knows block numbers only; the tensors are the model runner's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter

from blendserve.engine.block_allocator import BlockAllocator
from blendserve.engine.radix_tree import PrefixNode, RadixTree
from blendserve.engine.request import Request

_TOKEN_BYTES = 4
# Fewer tokens are computed anew: as little work as copying them, for which there would be one more thing to launch.
_MIN_COPIED_TOKENS = 8


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """The first `num_tokens` tokens of a block that another one shall begin with, before the step runs."""

    source: int
    target: int
    num_tokens: int


class KVCache:
    """Blocks of the running requests plus, in the prefix tree, blocks of earlier prompts until their room is needed.

    Full blocks are shared. Where two prompts part within a block, the second one's block begins with a copy.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        has_prefix_cache: bool,
        *,
        min_copied_tokens: int = _MIN_COPIED_TOKENS,
    ) -> None:
        self.block_size = block_size
        self._has_prefix_cache = has_prefix_cache
        self._min_copied_tokens = min_copied_tokens
        self._allocator = BlockAllocator(num_blocks)
        self._tree = RadixTree()
        self._step = 0
        self._copies: list[BlockCopy] = []
        self._copied_blocks: set[int] = set()  # sources and targets of this step's copies, which run all at one time

    @property
    def num_blocks(self) -> int:
        return self._allocator.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that hold nothing."""
        return self._allocator.num_free

    @property
    def num_used_blocks(self) -> int:
        """Blocks that running requests hold."""
        return self.num_blocks - self._allocator.num_free - self._tree.num_unreferenced

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def begin_step(self) -> None:
        """From now on, what was planned so far may be copied: it will have been stored by then."""
        self._step += 1
        self._copied_blocks.clear()

    def take_copies(self) -> list[BlockCopy]:
        """The copies that this step needs, to be made before it runs, in any order: none writes what another reads."""
        copies, self._copies = self._copies, []
        return copies

    def should_wait(self, request: Request) -> bool:
        """Whether much of the prompt could be copied in the next step, from a block that this one fills."""
        if not self._has_prefix_cache:
            return False
        nodes = self._tree.match(self._keys(request, (request.num_tokens - 1) // self.block_size))
        parent = nodes[-1] if nodes else self._tree.root
        found = [(node.planned_in < self._step, n) for node, n in self._nearest(request, parent, len(nodes))]
        ready = max((num_tokens for is_ready, num_tokens in found if is_ready), default=0)
        later = max((num_tokens for is_ready, num_tokens in found if not is_ready), default=0)
        return later >= ready + self._min_copied_tokens

    def count_cached_tokens(self, request: Request) -> tuple[int, int]:
        """Tokens of a request's prompt in full blocks of the cache, and how many of those no running request holds."""
        if not self._has_prefix_cache:
            return 0, 0
        nodes = self._tree.match(self._keys(request, (request.num_tokens - 1) // self.block_size))
        num_unreferenced = sum(not node.is_referenced for node in nodes)
        return len(nodes) * self.block_size, num_unreferenced * self.block_size

    def pin(self, requests: Iterable[Request]) -> None:
        """Spare the cached prefixes of requests that will be admitted soon."""
        if self._has_prefix_cache:
            self._tree.pin(node for request in requests for node in self._needed_nodes(request))

    def take_cached_blocks(self, request: Request) -> int:
        """Let a prefilling request use all cached blocks that come next in its prompt, instead of computing them.

        Also works in the middle of a block that someone else has completed meanwhile. The last token is never taken:
        somebody has to compute its logits. Returns the tokens gained.
        """
        if not self._has_prefix_cache:
            return 0
        started_at = request.num_computed_tokens
        first = started_at // self.block_size
        if first != request.num_tree_blocks:
            return 0
        keys = self._keys(request, (request.num_prefill_tokens - 1) // self.block_size)
        node = self._tree.node_of(request.block_table[first - 1]) if first else self._tree.root
        for key in keys[first:]:
            child = node.children.get(key)
            if child is None:
                break
            node = child
            if self._allocator.acquire(node.block) == 1:
                self._tree.set_referenced(node)
            self._put_tree_block(request, node.block)
        if len(request.block_table) == request.num_tree_blocks:
            self._copy_beginning(request, node)
        return request.num_computed_tokens - started_at

    def _copy_beginning(self, request: Request, parent: PrefixNode) -> None:
        """Begin the request's next block with what a block below `parent` has in common with its prompt."""
        nearest = self._nearest(request, parent, request.num_tree_blocks)
        found = [(node, num_tokens) for node, num_tokens in nearest if node.planned_in < self._step]
        if not found:
            return
        source, num_tokens = max(found, key=itemgetter(1))  # at most one from either side
        self._tree.touch(source)
        if not (self._allocator.num_free or self._evict()):
            return
        target = self._allocator.allocate()
        request.block_table.append(target)
        if target == source.block:  # it has just been given up
            request.num_computed_tokens += num_tokens
        elif target not in self._copied_blocks:
            request.num_computed_tokens += num_tokens
            self._copied_blocks |= {source.block, target}
            self._copies.append(BlockCopy(source.block, target, num_tokens))

    def _nearest(self, request: Request, parent: PrefixNode, num_blocks: int) -> Iterator[tuple[PrefixNode, int]]:
        """Blocks below `parent` that begin like the request's block number `num_blocks`, and for how many tokens.

        The last token of the prompt doesn't count: somebody has to compute its logits.
        """
        start = num_blocks * self.block_size
        end = min(start + self.block_size, request.num_prompt_tokens, request.num_tokens - 1)
        if end - start >= self._min_copied_tokens:
            key = request.prompt_token_ids[start:end].tobytes()
            yield from self._tree.nearest(
                parent,
                key,
                unit_bytes=_TOKEN_BYTES,
                min_units=self._min_copied_tokens,
                before_step=self._step,
            )

    def _needed_nodes(self, request: Request) -> list[PrefixNode]:
        """The cached blocks that a waiting request will share or copy."""
        nodes = self._tree.match(self._keys(request, request.num_prompt_tokens))
        nearest = self._nearest(request, nodes[-1] if nodes else self._tree.root, len(nodes))
        return nodes + [node for node, _ in nearest]

    def extend(self, request: Request, num_tokens: int) -> int:
        """Give a request blocks for up to `num_tokens` tokens. Returns the tokens that it has room for now."""
        missing = self.blocks_for(num_tokens) - len(request.block_table)
        for _ in range(missing):
            if not self._allocator.num_free and not self._evict():
                break
            request.block_table.append(self._allocator.allocate())
        return len(request.block_table) * self.block_size

    def share_prompt_blocks(self, request: Request, num_tokens: int) -> None:
        """Put a request's full prompt blocks into the prefix tree, up to its first `num_tokens` tokens.

        They may be shared from now on, even by requests of the same step: in each layer a step stores K and V of all
        its tokens before it attends to any. The prompt's end, in a block that its completion goes on with, may be
        copied from the next step on.
        """
        if not self._has_prefix_cache:
            return
        first = request.num_tree_blocks
        node = self._tree.node_of(request.block_table[first - 1]) if first else self._tree.root
        for key in self._keys(request, num_tokens // self.block_size)[first:]:
            if key in node.children:  # its own last block, computed again for the logits of the last token
                return
            node = self._tree.insert(node, key, request.block_table[request.num_tree_blocks], self._step)
            request.num_tree_blocks += 1
        end = self._end_key(request)
        is_complete = num_tokens >= request.num_prompt_tokens
        if is_complete and len(end) >= self._min_copied_tokens * _TOKEN_BYTES and end not in node.children:
            block = request.block_table[request.num_tree_blocks]
            if not self._tree.has_block(block):
                self._tree.insert(node, end, block, self._step)

    def release(self, request: Request) -> None:
        """Take all blocks from a request. Its prompt blocks stay cached."""
        for index in range(len(request.block_table) - 1, -1, -1):
            block = request.block_table[index]
            if self._allocator.release(block) > 0:
                continue
            if self._tree.has_block(block):
                self._tree.set_unreferenced(self._tree.node_of(block))
            else:
                self._allocator.free(block)
        request.block_table.clear()
        request.num_computed_tokens = request.num_tree_blocks = request.num_synced_blocks = 0

    def forget(self, request: Request) -> None:
        """Drop what is cached of a prompt, as far as nobody uses it: what is in it isn't fit to be shared."""
        if not self._has_prefix_cache:
            return
        nodes = self._tree.match(self._keys(request, request.num_prompt_tokens))
        end = (nodes[-1] if nodes else self._tree.root).children.get(self._end_key(request))
        for node in reversed([*nodes, *([end] if end else [])]):
            if node.is_referenced or node.children:
                return
            self._tree.remove(node)
            self._allocator.free(node.block)

    def check_integrity(self, running: Iterable[Request]) -> None:
        """Raise InvariantError where the books don't balance. Slow: for tests, and for when the engine is idle."""
        self._tree.check_integrity()
        tables = [request.block_table for request in running]
        cached = {block for block in range(self.num_blocks) if self._tree.has_block(block)}
        self._allocator.check_integrity(tables, cached)

    def _keys(self, request: Request, max_blocks: int) -> list[bytes]:
        """Keys of the first full blocks of a request's prompt."""
        width = self.block_size * _TOKEN_BYTES
        num_blocks = min(request.num_prompt_tokens // self.block_size, max_blocks)
        content = request.prompt_token_ids[: num_blocks * self.block_size].tobytes()
        return [content[start : start + width] for start in range(0, num_blocks * width, width)]

    def _end_key(self, request: Request) -> bytes:
        """Key of what a request's prompt has behind its last full block."""
        return request.prompt_token_ids[request.num_prompt_tokens // self.block_size * self.block_size :].tobytes()

    def _put_tree_block(self, request: Request, block: int) -> None:
        """Make `block` the request's next prompt block, in place of one of its own that it had begun to fill."""
        index = request.num_tree_blocks
        if index < len(request.block_table):
            own = request.block_table[index]
            self._allocator.release(own)
            self._allocator.free(own)
            request.block_table[index] = block
            request.num_synced_blocks = min(request.num_synced_blocks, index)
        else:
            request.block_table.append(block)
        request.num_tree_blocks += 1
        request.num_computed_tokens = request.num_tree_blocks * self.block_size

    def _evict(self) -> bool:
        block = self._tree.evict()
        if block is None:
            return False
        self._allocator.free(block)
        return True
