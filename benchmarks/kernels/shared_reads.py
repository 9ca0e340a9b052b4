"""Counts what decodes read of the KV cache several times over: prefixes that two or more running requests share.

    PYTHONPATH=kernels:. python benchmarks/kernels/shared_reads.py WORKLOADS

WORKLOADS holds traces made by `benchmarks/throughput/workloads.py`. A step prefills up to 8,192 tokens less those that
it decodes; at most 1,024 requests run, and no more than the KV cache holds at their full length. Of the order with two
ends, a request is taken from the end whose running requests hold fewer tokens. No GPU is needed: reads alone count.
"""

from __future__ import annotations

import sys
from bisect import bisect_left, insort
from collections import Counter, deque
from pathlib import Path

import numpy as np

from benchmarks.throughput.ordered_requests import OrderedRequests, read_ordered_requests, sort_prompts

CACHE_TOKENS, MAX_RUNNING, MAX_STEP_TOKENS, BLOCK = 464_000, 1024, 8192, 128
# Groups that could be read once: at least so many tokens in common, by so many requests.
GROUPS = ((128, 2), (128, 4), (512, 4), (512, 16))


def tokens_in_common(ranks: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Return how many tokens each running request shares with the next one in token order, [len(ranks) - 1].

    ranks: places in token order, ascending. shared: [num_requests], what each place shares with the one before.
    """
    if len(ranks) < 2:
        return np.zeros(0, dtype=np.int64)
    common: np.ndarray = np.minimum.reduceat(shared[: ranks[-1] + 1], ranks[:-1] + 1)
    return common


def saved_by_groups(common: np.ndarray, min_tokens: int, min_readers: int) -> int:
    """Return the reads saved if each run of requests with min_tokens or more in common read that once, in blocks."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], common >= min_tokens, [0]))))
    saved = 0
    for begin, end in edges.reshape(-1, 2):
        if end - begin + 1 >= min_readers:
            saved += int(common[begin:end].min()) // BLOCK * BLOCK * int(end - begin)
    return saved


class Batch:
    """The requests that run: admitted, prefilled in turn, decoded until their outputs are complete."""

    def __init__(self, requests: OrderedRequests) -> None:
        self.prompts = np.array([len(prompt) for prompt in requests.prompts])
        self.outputs = np.maximum(requests.output_tokens, 1)
        order, self.shared = sort_prompts(requests.prompts)
        self.rank = np.empty(len(order), dtype=np.int64)
        self.rank[order] = np.arange(len(order))
        self.is_two_ended = requests.is_two_ended
        self.waiting = deque(range(len(order)))
        self.admitted_ranks: list[int] = []
        self.held: list[dict[int, int]] = [{}, {}]  # running requests of each end: tokens at full length
        self.prefilling: deque[list[int]] = deque()  # request, tokens still to compute
        self.produced: dict[int, int] = {}  # output tokens of each decoding request

    def admit(self) -> None:
        """Admit what fits."""
        while self.waiting and sum(map(len, self.held)) < MAX_RUNNING:
            tokens = [sum(held.values()) for held in self.held]
            end = int(self.is_two_ended and tokens[1] < tokens[0])
            request = self.waiting[-end]
            missing = int(self.prompts[request]) - self._cached_tokens(int(self.rank[request]))
            size = missing + int(self.outputs[request])
            if sum(tokens) and sum(tokens) + size > CACHE_TOKENS:
                return
            self.waiting.rotate(end)
            self.waiting.popleft()
            self.held[end][request] = size
            insort(self.admitted_ranks, int(self.rank[request]))
            self.prefilling.append([request, max(missing, 1)])

    def _cached_tokens(self, rank: int) -> int:
        """Return what the request shares with one that was admitted before."""
        place = bisect_left(self.admitted_ranks, rank)
        before = behind = 0
        if place:
            before = int(self.shared[self.admitted_ranks[place - 1] + 1 : rank + 1].min())
        if place < len(self.admitted_ranks):
            behind = int(self.shared[rank + 1 : self.admitted_ranks[place] + 1].min())
        return max(before, behind)

    def step(self) -> None:
        """Decode a token of each request, and prefill what there is room for."""
        room = MAX_STEP_TOKENS - len(self.produced)
        for request in list(self.produced):
            self.produced[request] += 1
        while self.prefilling and room > 0:
            taken = min(room, self.prefilling[0][1])
            room -= taken
            self.prefilling[0][1] -= taken
            if self.prefilling[0][1] == 0:
                self.produced[self.prefilling.popleft()[0]] = 1
        for request in [r for r, count in self.produced.items() if count >= self.outputs[r]]:
            del self.produced[request]
            for held in self.held:
                held.pop(request, None)


def count_reads(requests: OrderedRequests) -> Counter[object]:
    """Return the tokens that all decodes read: "all", "shared" with another decode, and saved by each of GROUPS."""
    batch, reads = Batch(requests), Counter[object]()
    while batch.waiting or batch.prefilling or batch.produced:
        batch.admit()
        decodes = np.fromiter(batch.produced, dtype=np.int64, count=len(batch.produced))
        common = tokens_in_common(np.sort(batch.rank[decodes]), batch.shared)
        padded = np.concatenate(([0], common, [0]))
        reads["all"] += int(batch.prompts[decodes].sum()) + sum(batch.produced.values())
        reads["shared"] += int(np.maximum(padded[:-1], padded[1:]).sum())
        for group in GROUPS:
            reads[group] += saved_by_groups(common, *group)
        batch.step()
    return reads


def main() -> None:
    """Print a line per trace and order."""
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        if not (folder / "orders.parquet").is_file():
            continue
        for policy in ("dfs", "blend"):
            reads = count_reads(read_ordered_requests(folder, policy))
            saved = ", ".join(
                f"{tokens} x {readers} {reads[tokens, readers] / reads['all']:.4f}" for tokens, readers in GROUPS
            )
            shared = reads["shared"] / reads["all"]
            print(
                f"{folder.name} {policy}: {reads['all'] / 1e9:.2f} G tokens read, shared {shared:.4f}, saved: {saved}"
            )


if __name__ == "__main__":
    main()
