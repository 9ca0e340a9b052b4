"""A prefix tree over full KV cache blocks: which prompts' beginnings are cached, and which block to give up first.

A node is one block. It is keyed under its parent by the block's own token ids (as bytes), so two prompts meet in a node
exactly when all their tokens up to there are equal. Knows nothing of requests; its owner says which nodes are in use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from blendserve.engine.invariants import InvariantError, require


class PrefixNode:
    """One full block of a prompt. `pin_epoch`: the last time that an upcoming request was seen to need it."""

    __slots__ = ("block", "children", "is_referenced", "key", "parent", "pin_epoch")

    def __init__(self, block: int, key: bytes, parent: PrefixNode | None) -> None:
        self.block = block
        self.key = key
        self.parent = parent
        self.children: dict[bytes, PrefixNode] = {}
        self.is_referenced = True
        self.pin_epoch = 0


class RadixTree:
    """The tree. A referenced node's ancestors are referenced too, so all unreferenced nodes can go, leaves first.

    Every call but `match` and `pin`, which walk a path, is O(1).
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

    def insert(self, parent: PrefixNode, key: bytes, block: int) -> PrefixNode:
        """Add a referenced node below a referenced `parent` (or the root), which must not have `key` yet."""
        require(key not in parent.children and block not in self._node_of_block, "a new node is new")
        node = PrefixNode(block, key, parent)
        parent.children[key] = node
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

    def pin(self, paths: Iterable[Sequence[bytes]]) -> None:
        """Spare the nodes of these paths while there is anything else to evict. Replaces what was pinned before."""
        self._pin_epoch += 1
        for path in paths:
            for node in self.match(path):
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
            require((node in self._evictable) == (is_leaf and not node.is_referenced), "unused leaves are evictable")
            reached.add(node.block)
            num_unreferenced += not node.is_referenced
        require(reached == set(self._node_of_block), "every node hangs in the tree")
        require(num_unreferenced == self._num_unreferenced, "the count of unused nodes")
