"""The prefix tree as an icicle chart: the largest prefixes by the prompt tokens under them, the rest merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go
import pyarrow.parquet as pq
from numpy.typing import NDArray

from blendserve.report.figure_style import Chart, style
from blendserve.report.job_files import JobFiles, read_columns
from blendserve.report.number_format import count_of, format_count, format_share

_TITLE = "Prefix tree"
_MAX_PREFIXES = 150  # each may bring one merged box with it
_MIN_SHARE = 0.004  # of all prompt tokens: a smaller box can't be seen
_SHADES = 5


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Nodes of the prefix tree; every array is [num_prefixes], the parent of each stands before it (-1: none).

    num_saved_tokens: prompt tokens below the node that needn't be computed when its requests run side by side.
    has_longer: whether longer prefixes hang below it, drawn or not.
    """

    parent: NDArray[np.int64]
    depth_tokens: NDArray[np.int64]
    num_requests: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_saved_tokens: NDArray[np.int64]
    has_longer: NDArray[np.bool_]

    def largest(self, max_prefixes: int) -> Prefixes:
        """The prefixes with most prompt tokens under them. A parent has at least its child's, so parents stay in."""
        order = np.lexsort((self.depth_tokens, -self.num_tokens))[:max_prefixes]
        order = order[self.num_tokens[order] >= _MIN_SHARE * self.num_tokens[order[:1]].sum()]
        new_place = np.full(len(self.parent) + 1, -1)  # the last one stands for "no parent"
        new_place[order] = np.arange(len(order))
        return Prefixes(
            new_place[self.parent[order]],
            self.depth_tokens[order],
            self.num_requests[order],
            self.num_tokens[order],
            self.num_saved_tokens[order],
            self.has_longer[order],
        )


def draw_prefix_tree(job: JobFiles) -> Chart:
    """The chart of `prefix_nodes`, at most 300 boxes."""
    prefixes = _read_prefixes(job)
    if prefixes is None:
        return Chart.missing("tree", _TITLE, "The job has not been analyzed yet, so there is no prefix tree to draw.")
    if prefixes.num_tokens.sum() == 0:
        return Chart.missing("tree", _TITLE, "No row became a request, so there is no prefix tree to draw.")
    caption = (
        "Each box is a prefix that several prompts begin with, as tall as the prompt tokens below it and of a stronger "
        f"colour the more of them need computing only once; there are {format_count(len(prefixes.parent))} prefixes "
        "in all, the small ones are merged into “other”, and a click on a box zooms in."
    )
    if len(prefixes.parent) == 1:
        caption = "No two prompts begin alike, so the tree is one box: nothing can be shared."
    return Chart.drawn("tree", _TITLE, caption, _icicle(prefixes.largest(_MAX_PREFIXES)))


def _read_prefixes(job: JobFiles) -> Prefixes | None:
    nodes, requests = job.folder.relation("prefix_nodes"), job.folder.relation("sorted_requests")
    if not (nodes.is_file() and requests.is_file()):
        return None
    prompt_tokens, shared_tokens = read_columns(requests, "num_prompt_tokens", "shared_prefix_tokens")
    depth, first, count = read_columns(nodes, "depth_tokens", "first_position", "num_requests")
    parent = pq.read_table(nodes, columns=["parent_id"]).column("parent_id").fill_null(-1).to_numpy().astype(np.int64)
    end = first + count
    tokens_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(prompt_tokens, dtype=np.int64)])
    saved_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(shared_tokens, dtype=np.int64)])
    second = np.minimum(first + 1, end)  # the first request of a prefix computes it
    return Prefixes(
        parent,
        depth.astype(np.int64),
        count.astype(np.int64),
        tokens_before[end] - tokens_before[first],
        saved_before[end] - saved_before[second],
        np.bincount(parent[parent >= 0], minlength=len(parent)) > 0,
    )


class _Box(NamedTuple):
    """What is drawn for a prefix, or for all small ones below it together."""

    id: str
    parent: str
    label: str
    color: str
    ink: str
    num_tokens: int
    hover: str


def _icicle(prefixes: Prefixes) -> go.Figure:
    ids, parents, labels, colors, inks, tokens, hover = (
        list(values) for values in zip(*_prefix_boxes(prefixes), *_rest_boxes(prefixes), strict=True)
    )
    icicle = go.Icicle(
        ids=ids,
        parents=parents,
        labels=labels,
        values=tokens,
        hovertext=hover,
        hoverinfo="text",
        branchvalues="total",
        maxdepth=6,
        marker={"colors": colors, "line": {"color": "var(--surface)", "width": 1.5}},
        textinfo="label",
        textfont={"color": inks},
        pathbar={"thickness": 22, "textfont": {"size": 12}},
        tiling={"pad": 1},
    )
    return style(go.Figure(icicle), height=480, uniformtext={"minsize": 9, "mode": "hide"})


def _prefix_boxes(prefixes: Prefixes) -> Iterator[_Box]:
    saved_share = prefixes.num_saved_tokens / np.maximum(prefixes.num_tokens, 1)
    shade = np.minimum((saved_share * _SHADES).astype(int), _SHADES - 1)
    for place, parent in enumerate(prefixes.parent.tolist()):
        depth, requests = int(prefixes.depth_tokens[place]), count_of(int(prefixes.num_requests[place]), "request")
        num_tokens = int(prefixes.num_tokens[place])
        hover = (
            f"{requests} with {format_count(num_tokens)} prompt tokens"
            f"{f', all beginning with the same {format_count(depth)}' if depth else ''}<br>"
            f"{format_share(saved_share[place])} of the tokens repeat what another of these requests has computed"
        )
        yield _Box(
            id=f"prefix {place}",
            parent=f"prefix {parent}" if parent >= 0 else "",
            label=f"{f'first {format_count(depth)} tokens' if depth else 'all prompts'} · {requests}",
            color=f"var(--tree-{shade[place]})",
            ink=f"var(--tree-ink-{shade[place]})",
            num_tokens=num_tokens,
            hover=hover,
        )


def _rest_boxes(prefixes: Prefixes) -> Iterator[_Box]:
    for place, num_requests, num_tokens in _merged(prefixes):
        hover = (
            f"{count_of(num_requests, 'request')} with {format_count(num_tokens)} prompt tokens, which part ways after "
            f"{format_count(prefixes.depth_tokens[place])}<br>tokens or share more only in small groups"
        )
        yield _Box(
            id=f"rest of {place}",
            parent=f"prefix {place}",
            label=f"other · {count_of(num_requests, 'request')}",
            color="var(--tree-rest)",
            ink="var(--tree-ink-0)",
            num_tokens=num_tokens,
            hover=hover,
        )


def _merged(prefixes: Prefixes) -> list[tuple[int, int, int]]:
    """(place, requests, prompt tokens) of what is left of each drawn prefix beside its drawn children."""
    children = prefixes.parent[prefixes.parent >= 0]
    left = []
    for values in (prefixes.num_requests, prefixes.num_tokens):
        rest = values.copy()
        np.subtract.at(rest, children, values[prefixes.parent >= 0])
        left.append(rest)
    places = np.flatnonzero(prefixes.has_longer & (left[0] > 0))
    return [(int(place), int(left[0][place]), int(left[1][place])) for place in places]
