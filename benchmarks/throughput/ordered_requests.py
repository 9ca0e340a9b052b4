"""A workload's requests in the order of a policy; needs NumPy and PyArrow alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


@dataclass(frozen=True)
class OrderedRequests:
    """Arrays [num_requests], and the prompts, in the order of admission."""

    prompts: list[np.ndarray]
    output_tokens: np.ndarray
    compute_seconds: np.ndarray
    memory_seconds: np.ndarray
    unit_density: np.ndarray
    is_two_ended: bool

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + int(self.output_tokens.sum())


def read_ordered_requests(folder: Path, policy: str) -> OrderedRequests:
    orders = pq.read_table(folder / "orders.parquet")
    order = orders.filter(pc.equal(orders.column("policy"), policy)).sort_by("position")
    if order.num_rows == 0:
        raise SystemExit(f"{folder} has no order '{policy}'.")
    requests = pq.read_table(folder / "requests.parquet").take(pa.array(order.column("row")))
    numbers = {name: order.column(name).to_numpy() for name in ("compute_seconds", "memory_seconds", "unit_density")}
    return OrderedRequests(
        prompts=[prompt.values.to_numpy() for prompt in requests.column("prompt_token_ids")],
        output_tokens=requests.column("output_tokens").to_numpy(),
        is_two_ended=policy == "blend",
        **numbers,
    )


def sort_prompts(prompts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The prompts' places in token order, and the tokens that each shares with the one before."""
    keys = [prompt.astype(">i4").tobytes() for prompt in prompts]
    order = np.array(sorted(range(len(prompts)), key=keys.__getitem__), dtype=np.int64)
    shared = np.zeros(len(order), dtype=np.int64)
    for place in range(1, len(order)):
        before, this = prompts[order[place - 1]], prompts[order[place]]
        length = min(len(before), len(this))
        differs = np.flatnonzero(before[:length] != this[:length])
        shared[place] = differs[0] if len(differs) else length
    return order, shared
