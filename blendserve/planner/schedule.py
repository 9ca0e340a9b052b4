"""The order in which requests run, as arrays: policy, units, shards, and what each request costs where it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from blendserve.planner.output_lengths import OutputLengths
from blendserve.planner.prefix_tree import PrefixTree, build_prefix_tree, range_minimum
from blendserve.planner.requests import RequestStates
from blendserve.planner.sharding import choose_num_shards, split_from_both_ends, split_in_order
from blendserve.planner.units import cut_into_units, order_by_density, spread_prefix_costs
from blendserve.spec import Policy

_MAX_SHARED_WHEN_DEALT = 0.05  # of a request's tokens: what is shared with its neighbours is worth little to it


class CostModel(Protocol):
    """Compute and memory seconds of requests by their lengths; all arrays [num_requests]."""

    def __call__(
        self,
        *,
        num_prompt_tokens: NDArray[np.int64],
        shared_prefix_tokens: NDArray[np.int64],
        mean_output_tokens: NDArray[np.float64],
        mean_square_output_tokens: NDArray[np.float64],
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...


@dataclass(frozen=True, slots=True)
class PlannedRequests:
    """The requests to order, sorted by their prompts; arrays [num_requests].

    shared_prefix_tokens: with the request before, among these. arrival: the place in the input, for fcfs.
    """

    num_prompt_tokens: NDArray[np.int64]
    shared_prefix_tokens: NDArray[np.int64]
    mean_output_tokens: NDArray[np.float64]
    mean_square_output_tokens: NDArray[np.float64]
    arrival: NDArray[np.int64]

    @property
    def num_requests(self) -> int:
        return len(self.num_prompt_tokens)

    @classmethod
    def of_rows(cls, states: RequestStates, lengths: OutputLengths, rows: NDArray[np.int64]) -> PlannedRequests:
        """The requests at the places `rows` (ascending) of a job's sorted requests."""
        return cls(
            num_prompt_tokens=states.num_prompt_tokens[rows],
            shared_prefix_tokens=shared_with_previous(states.shared_prefix_tokens, rows),
            mean_output_tokens=lengths.mean[rows],
            mean_square_output_tokens=lengths.mean_square[rows],
            arrival=states.row_index[rows],
        )

    def subset(self, rows: NDArray[np.int64]) -> PlannedRequests:
        """Only those at the places `rows` (ascending)."""
        return PlannedRequests(
            num_prompt_tokens=self.num_prompt_tokens[rows],
            shared_prefix_tokens=shared_with_previous(self.shared_prefix_tokens, rows),
            mean_output_tokens=self.mean_output_tokens[rows],
            mean_square_output_tokens=self.mean_square_output_tokens[rows],
            arrival=self.arrival[rows],
        )


@dataclass(frozen=True, slots=True)
class Schedule:
    """Requests in the order of the shard files; arrays [num_requests], one place after the other.

    positions: index into the PlannedRequests. shard, shard_position, unit_id: where each stands.
    shared_prefix_tokens: with the place before in the same shard. compute_seconds, memory_seconds: at that sharing.
    shared_tokens_optimal, ideal_compute_seconds: sums where no shared token is computed twice.
    """

    positions: NDArray[np.int64]
    unit_id: NDArray[np.int64]
    unit_density: NDArray[np.float64]
    shard: NDArray[np.int64]
    shard_position: NDArray[np.int64]
    shared_prefix_tokens: NDArray[np.int64]
    compute_seconds: NDArray[np.float64]
    memory_seconds: NDArray[np.float64]
    num_shards: int
    is_two_ended: bool
    shared_tokens_optimal: int
    ideal_compute_seconds: float


def schedule_requests(
    requests: PlannedRequests,
    *,
    policy: Policy,
    seed: int,
    num_shards: int | None,
    costs: CostModel,
    gpus: int = 1,
) -> Schedule:
    """Order `requests` by `policy` and cut the order into shards; `num_shards` None: by predicted time, a multiple of
    `gpus`.
    """
    tree = build_prefix_tree(requests.shared_prefix_tokens)
    compute, memory = _spread_costs(requests, tree, costs)
    positions, begins = _order(requests, tree, policy, seed, compute, memory)
    unit_id, unit_density = _units(begins, compute[positions], memory[positions])
    seconds = float(compute.sum() + memory.sum())
    chosen = choose_num_shards(num_shards, predicted_seconds=seconds, num_requests=requests.num_requests, gpus=gpus)
    shards = _split(requests, positions, policy, compute[positions], memory[positions], chosen) if chosen else []
    places = np.concatenate([np.zeros(0, np.int64), *shards])
    sizes = np.array([len(shard) for shard in shards], dtype=np.int64)
    shard_begins = np.cumsum(sizes) - sizes
    positions = positions[places]
    shared = shared_with_previous(requests.shared_prefix_tokens, positions)
    shared[shard_begins] = 0
    compute_here, memory_here = _request_costs(requests, positions, shared, costs)
    return Schedule(
        positions=positions,
        unit_id=unit_id[places],
        unit_density=unit_density[places],
        shard=np.repeat(np.arange(chosen), sizes),
        shard_position=np.arange(len(places)) - np.repeat(shard_begins, sizes),
        shared_prefix_tokens=shared,
        compute_seconds=compute_here,
        memory_seconds=memory_here,
        num_shards=chosen,
        is_two_ended=policy == "blend",
        shared_tokens_optimal=int(requests.shared_prefix_tokens.sum()),
        ideal_compute_seconds=float(compute.sum()),
    )


def _split(
    requests: PlannedRequests,
    positions: NDArray[np.int64],
    policy: Policy,
    compute: NDArray[np.float64],
    memory: NDArray[np.float64],
    num_shards: int,
) -> list[NDArray[np.int64]]:
    """The places of each shard in the order `positions`; costs are in that order."""
    if policy != "blend":
        return split_in_order(compute, memory, num_shards)
    shared = shared_with_previous(requests.shared_prefix_tokens, positions)
    shared = np.maximum(shared, np.append(shared[1:], 0)) - shared[1:].min(initial=int(shared.max(initial=0)))
    tokens = requests.num_prompt_tokens[positions] + requests.mean_output_tokens[positions]
    is_free = shared <= _MAX_SHARED_WHEN_DEALT * tokens
    is_alone = shared <= _MAX_SHARED_WHEN_DEALT * requests.num_prompt_tokens[positions]
    return split_from_both_ends(compute, memory, num_shards, is_free=is_free, is_alone=is_alone)


def shared_with_previous(shared_prefix_tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """[num_places]: tokens shared with the place before when sorted requests stand in the order `positions`."""
    shared = np.zeros(len(positions), np.int64)
    low = np.minimum(positions[:-1], positions[1:])
    high = np.maximum(positions[:-1], positions[1:])
    shared[1:] = range_minimum(shared_prefix_tokens, low + 1, high)
    return shared


def _order(
    requests: PlannedRequests,
    tree: PrefixTree,
    policy: Policy,
    seed: int,
    compute: NDArray[np.float64],
    memory: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted positions in the policy's order, and the places where units begin."""
    every = np.arange(requests.num_requests)
    if policy == "blend":
        return _blend(tree, compute, memory)
    if policy == "dfs":
        shared = requests.shared_prefix_tokens
        return every, np.flatnonzero((shared <= shared[1:].min(initial=shared.max(initial=0))) | (every == 0))
    if policy == "random":
        return np.random.default_rng(seed).permutation(requests.num_requests), every
    by_arrival = np.argsort(requests.arrival, kind="stable")
    if policy == "fcfs":
        return by_arrival, every
    return by_arrival[np.argsort(-requests.mean_output_tokens[by_arrival], kind="stable")], every


def _blend(
    tree: PrefixTree, compute: NDArray[np.float64], memory: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Units by falling density; each keeps the order that the tree, sorted by density, gives it."""
    order = order_by_density(tree, compute, memory)
    begins = cut_into_units(order, compute[order.positions], memory[order.positions])
    if len(begins) == 0:
        return order.positions, begins
    sizes = np.diff(np.append(begins, len(order.positions)))
    unit_compute = np.add.reduceat(compute[order.positions], begins)
    unit_memory = np.add.reduceat(memory[order.positions], begins)
    by_density = np.lexsort((begins, -unit_compute / unit_memory))
    sorted_begins = np.cumsum(sizes[by_density]) - sizes[by_density]
    shift = np.repeat(begins[by_density] - sorted_begins, sizes[by_density])
    return order.positions[np.arange(len(shift)) + shift], sorted_begins


def _units(
    begins: NDArray[np.int64], compute: NDArray[np.float64], memory: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Unit id and density of the unit at each place."""
    unit_id = np.zeros(len(compute), np.int64)
    unit_id[begins[1:]] = 1
    unit_id = np.cumsum(unit_id)
    if len(begins) == 0:
        return unit_id, np.zeros(0)
    return unit_id, (np.add.reduceat(compute, begins) / np.add.reduceat(memory, begins))[unit_id]


def _spread_costs(
    requests: PlannedRequests, tree: PrefixTree, costs: CostModel
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Costs [num_requests] where each shared token is computed once and paid by all who share it."""
    everyone = np.arange(requests.num_requests)
    own_compute, memory = _request_costs(requests, everyone, tree.depth_tokens[tree.leaf_node], costs)
    no_output = np.zeros(tree.num_nodes)
    edge_compute, _ = costs(
        num_prompt_tokens=tree.depth_tokens,
        shared_prefix_tokens=tree.depth_tokens[tree.parent],
        mean_output_tokens=no_output,
        mean_square_output_tokens=no_output,
    )
    return spread_prefix_costs(tree, edge_compute, own_compute), memory


def _request_costs(
    requests: PlannedRequests, positions: NDArray[np.int64], shared: NDArray[np.int64], costs: CostModel
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return costs(
        num_prompt_tokens=requests.num_prompt_tokens[positions],
        shared_prefix_tokens=shared,
        mean_output_tokens=requests.mean_output_tokens[positions],
        mean_square_output_tokens=requests.mean_square_output_tokens[positions],
    )
