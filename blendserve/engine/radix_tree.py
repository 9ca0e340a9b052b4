"""A prefix tree over KV cache blocks: which prompts' beginnings are cached, and which block to give up first.

A node is one block, full but for leaves that hold a prompt's end. It is keyed under its parent by the block's own token
ids (as bytes), so two prompts meet in a node exactly when all their tokens up to there are equal. Where they part
within a block, `nearest` finds the block that agrees longest. Knows nothing of requests; its owner says which nodes are
in use.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from blendserve.engine.invariants import InvariantError, require


class PrefixNode:
    """One block of a prompt. `pin_epoch`: the last time that an upcoming request was seen to need it.

    `planned_in`: the step that stores its tokens, as its owner counts them. `sorted_keys`: those of its children.
    """

    __slots__ = ("block", "children", "is_referenced", "key", "parent", "pin_epoch", "planned_in", "sorted_keys")

    def __init__(self, block: int, key: bytes, parent: PrefixNode | None, planned_in: int = 0) -> None:
        self.block = block
        self.key = key
        self.parent = parent
        self.children: dict[bytes, PrefixNode] = {}
        self.is_referenced = True
        self.pin_epoch = 0
        self.planned_in = planned_in
        self.sorted_keys: list[bytes] = []


class RadixTree:
    """The tree. A referenced node's ancestors are referenced too, so all unreferenced nodes can go, leaves first.

    Every call but `match` and `pin`, which walk a path, is O(log children).
    """

    def __init__(self) -> None:
        self.root = PrefixNode(block=-1, key=b"", parent=None)
        self._node_of_block: dict[int, PrefixNode] = {}
        # Unreferenced leaves, least recently used first. A parent enters it when its last child is evicted; it was last
        # used with that child, so it goes to the front.
        self._evictable: OrderedDict[PrefixNode, None] = OrderedDict()
        self._num_unreferenced = 0
        self._pin_epoch = 1

    @property
    def num_unreferenced(self) -> int:
        """Blocks that could be evicted."""
        return self._num_unreferenced

    @property
    def num_nodes(self) -> int:
        return len(self._node_of_block)

    def has_block(self, block: int) -> bool:
        return block in self._node_of_block

    def node_of(self, block: int) -> PrefixNode:
        """The node of a block that is in the tree."""
        return self._node_of_block[block]

    def match(self, keys: Sequence[bytes]) -> list[PrefixNode]:
        """The nodes of the longest known beginning of `keys`."""
        nodes, node = [], self.root
        for key in keys:
            child = node.children.get(key)
            if child is None:
                break
            nodes.append(child)
            node = child
        return nodes

    def nearest(
        self, parent: PrefixNode, key: bytes, *, unit_bytes: int, min_units: int, before_step: int
    ) -> Iterator[tuple[PrefixNode, int]]:
        """Children whose keys agree with `key` in at least `min_units` units from the beginning, and in how many.

        From the key's place in sorted order outwards, so with falling agreement, to either side as far as the first
        that was planned before `before_step`.
        """
        keys, place = parent.sorted_keys, bisect_left(parent.sorted_keys, key)
        for places in (range(place - 1, -1, -1), range(place, len(keys))):
            for index in places:
                child, agreement = parent.children[keys[index]], _common_bytes(keys[index], key) // unit_bytes
                if agreement < min_units:
                    break
                yield child, agreement
                if child.planned_in < before_step:
                    break

    def insert(self, parent: PrefixNode, key: bytes, block: int, planned_in: int = 0) -> PrefixNode:
        """Add a referenced node below a referenced `parent` (or the root), which must not have `key` yet."""
        require(key not in parent.children and block not in self._node_of_block, "a new node is new")
        node = PrefixNode(block, key, parent, planned_in)
        parent.children[key] = node
        insort(parent.sorted_keys, key)
        self._node_of_block[block] = node
        return node

    def set_referenced(self, node: PrefixNode) -> None:
        """Someone uses the node again; its parent must be in use already."""
        require(not node.is_referenced, "a node comes into use once")
        node.is_referenced = True
        self._num_unreferenced -= 1
        self._evictable.pop(node, None)

    def set_unreferenced(self, node: PrefixNode) -> None:
        """Nobody uses the node any more; nobody may use its children either."""
        require(node.is_referenced, "a node goes out of use once")
        node.is_referenced = False
        self._num_unreferenced += 1
        if not node.children:
            self._evictable[node] = None

    def touch(self, node: PrefixNode) -> None:
        """An unreferenced leaf has been of use once more."""
        if node in self._evictable:
            self._evictable.move_to_end(node)

    def pin(self, nodes: Iterable[PrefixNode]) -> None:
        """Spare these nodes while there is anything else to evict. Replaces what was pinned before."""
        self._pin_epoch += 1
        for node in nodes:
            node.pin_epoch = self._pin_epoch

    def evict(self) -> int | None:
        """Remove the leaf that was unused longest, a pinned one last. Returns its block, None if all are in use."""
        for _ in range(len(self._evictable)):
            node = next(iter(self._evictable))
            if node.pin_epoch != self._pin_epoch:
                break
            self._evictable.move_to_end(node)
        else:
            node = next(iter(self._evictable), self.root)
            if node is self.root:
                return None
        self.remove(node)
        return node.block

    def remove(self, node: PrefixNode) -> None:
        """Forget an unreferenced leaf."""
        parent = node.parent
        if parent is None or node.is_referenced or node.children:
            raise InvariantError("only an unreferenced leaf can be removed")
        self._evictable.pop(node, None)
        self._num_unreferenced -= 1
        del self._node_of_block[node.block]
        del parent.children[node.key]
        del parent.sorted_keys[bisect_left(parent.sorted_keys, node.key)]
        if parent is not self.root and not parent.children and not parent.is_referenced:
            self._evictable[parent] = None
            self._evictable.move_to_end(parent, last=False)

    def check_integrity(self) -> None:
        """Raise InvariantError where the tree contradicts itself. Walks all nodes."""
        reached, num_unreferenced = set(), 0
        pending = list(self.root.children.values())
        while pending:
            node = pending.pop()
            pending.extend(node.children.values())
            parent, is_leaf = node.parent or self.root, not node.children
            require(parent.children.get(node.key) is node, "a node is its parent's child")
            require(self._node_of_block.get(node.block) is node, "a node is found by its block")
            require(parent.is_referenced or not node.is_referenced, "the parent of a used node is in use")
            require(node.sorted_keys == sorted(node.children), "children are found in order")
            require((node in self._evictable) == (is_leaf and not node.is_referenced), "unused leaves are evictable")
            reached.add(node.block)
            num_unreferenced += not node.is_referenced
        require(reached == set(self._node_of_block), "every node hangs in the tree")
        require(num_unreferenced == self._num_unreferenced, "the count of unused nodes")


def _common_bytes(one: bytes, other: bytes) -> int:
    """How many bytes two keys begin with in common."""
    length = min(len(one), len(other))
    difference = int.from_bytes(one[:length], "big") ^ int.from_bytes(other[:length], "big")
    return length - (difference.bit_length() + 7) // 8
