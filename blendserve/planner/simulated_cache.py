"""The simulator's prefix cache: which nodes of the prefix tree are in the KV cache; least recently used go first."""

from __future__ import annotations

from collections import OrderedDict

from blendserve.planner.prefix_tree import ROOT, PrefixTree


class SimulatedCache:
    """Nodes of a prefix tree with their edges' tokens; a node that a running request stands on is never evicted."""

    __slots__ = ("_depth", "_edge", "_leaf", "_parent", "_resident", "_users", "pinned_tokens", "resident_tokens")

    def __init__(self, tree: PrefixTree) -> None:
        self._parent: list[int] = tree.parent.tolist()
        self._depth: list[int] = tree.depth_tokens.tolist()
        self._edge: list[int] = (tree.depth_tokens - tree.depth_tokens[tree.parent]).tolist()
        self._leaf: list[int] = tree.leaf_node.tolist()
        self._users = [0] * tree.num_nodes
        self._resident: OrderedDict[int, None] = OrderedDict()  # least recently used first; parents after children
        self.pinned_tokens = 0
        self.resident_tokens = 0

    def shared_tokens(self, request: int) -> int:
        """Tokens of the request's prompt that other prompts begin with too."""
        return self._depth[self._leaf[request]]

    def missing_tokens(self, request: int) -> int:
        """Tokens of the request's shared prefix that would have to be pinned: no running request stands on them."""
        node = self._leaf[request]
        while node != ROOT and not self._users[node]:
            node = self._parent[node]
        return self._depth[self._leaf[request]] - self._depth[node]

    def acquire(self, request: int) -> int:
        """Pin the request's shared prefix, computing what is missing; returns the tokens found in the cache."""
        leaf = self._leaf[request]
        found, node = ROOT, leaf
        while node != ROOT:
            if node in self._resident:
                if found == ROOT:
                    found = node
                self._resident.move_to_end(node)
            else:
                self._resident[node] = None
                self.resident_tokens += self._edge[node]
            if not self._users[node]:
                self.pinned_tokens += self._edge[node]
            self._users[node] += 1
            node = self._parent[node]
        return self._depth[found]

    def release(self, request: int) -> None:
        """Unpin the request's shared prefix; it stays until its room is needed."""
        node = self._leaf[request]
        while node != ROOT:
            self._users[node] -= 1
            if not self._users[node]:
                self.pinned_tokens -= self._edge[node]
            node = self._parent[node]

    def shrink(self, max_resident_tokens: float) -> None:
        """Evict unpinned nodes, least recently used first, until at most `max_resident_tokens` are resident."""
        while self.resident_tokens > max(max_resident_tokens, self.pinned_tokens):
            node, _ = self._resident.popitem(last=False)
            if self._users[node]:
                self._resident[node] = None
            else:
                self.resident_tokens -= self._edge[node]
