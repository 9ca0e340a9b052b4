"""The density of the plan's units along the plan, with the fronts that requests are admitted from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from blendserve.report.figure_style import INK, LEFT, MAX_POINTS, MUTED, RIGHT, Chart, log_ticks, style
from blendserve.report.job_files import JobFiles, read_columns
from blendserve.report.number_format import count_of, format_ratio

_TITLE = "Density along the plan"
_MAX_MARKED_SHARDS = 8


@dataclass(frozen=True, slots=True)
class Steps:
    """Runs of equal density along the plan: `start` [num_steps] in requests, `density` and `shard` likewise."""

    start: NDArray[np.int64]
    density: NDArray[np.float64]
    shard: NDArray[np.int64]
    num_requests: int

    @property
    def shard_starts(self) -> NDArray[np.int64]:
        """Indices of the first step of each shard."""
        return np.flatnonzero(np.diff(self.shard, prepend=-1) != 0)

    def thinned(self, max_steps: int) -> Steps:
        """At most about `max_steps` steps, evenly spread over the requests; the first and last of a shard stay."""
        if len(self.start) <= max_steps:
            return self
        even = np.linspace(0, self.num_requests - 1, max_steps)
        starts = self.shard_starts[: max_steps // 2]
        kept = np.concatenate([np.searchsorted(self.start, even, side="right") - 1, starts, starts[1:] - 1])
        kept = np.unique(np.append(kept, len(self.start) - 1))
        return Steps(self.start[kept], self.density[kept], self.shard[kept], self.num_requests)


def draw_density(job: JobFiles) -> Chart:
    """The chart of `request_order`."""
    path = job.folder.relation("request_order")
    if job.plan is None or not path.is_file():
        return Chart.missing("density", _TITLE, "The job has not been planned yet, so there is no order to draw.")
    steps = _read_steps(*read_columns(path, "plan_position", "unit_density", "shard"))
    if len(steps.start) == 0:
        return Chart.missing("density", _TITLE, "No request was left to plan, so there is no order to draw.")
    caption = (
        "Density is compute time over memory time, here of each unit of requests that stay together, in the order of "
        f"the plan’s {count_of(steps.num_requests, 'request')} (1: both take equally long); "
    )
    if job.plan.is_two_ended:
        caption += "every shard is run from both ends at once, so that the mixture stays near the dashed overall value."
    else:
        caption += f"policy {job.plan.policy} runs them from left to right."
    overall = job.plan.summary.get("density")
    return Chart.drawn("density", _TITLE, caption, _figure(steps, overall, is_two_ended=job.plan.is_two_ended))


def _read_steps(position: NDArray[np.int64], density: NDArray[np.float64], shard: NDArray[np.int64]) -> Steps:
    order = np.argsort(position, kind="stable")
    density, shard = density[order], shard[order].astype(np.int64)
    is_start = np.ones(len(order), np.bool_)
    is_start[1:] = (np.diff(density) != 0) | (np.diff(shard) != 0)
    start = np.flatnonzero(is_start)
    return Steps(start, density[start], shard[start], len(order)).thinned(MAX_POINTS)


def _figure(steps: Steps, overall: float | None, *, is_two_ended: bool) -> go.Figure:
    density = np.where((steps.density > 0) & np.isfinite(steps.density), steps.density, np.nan)
    figure = go.Figure(
        go.Scatter(
            x=np.append(steps.start, steps.num_requests),
            y=np.append(density, density[-1]),
            customdata=np.append(steps.shard, steps.shard[-1]),
            mode="lines",
            line={"shape": "hv", "color": INK, "width": 1.8},
            hovertemplate="request %{x:,}<br>density %{y:.3g}<br>shard %{customdata}<extra></extra>",
            showlegend=False,
        )
    )
    starts = steps.shard_starts
    ends = np.append(starts[1:], len(steps.start)) - 1
    end_positions = np.append(steps.start[starts[1:]], steps.num_requests)
    for begin in starts[1:][: 4 * _MAX_MARKED_SHARDS]:
        figure.add_vline(x=int(steps.start[begin]), line={"color": MUTED, "width": 1, "dash": "dot"})
    marked = slice(0, _MAX_MARKED_SHARDS)
    inside = steps.num_requests * 0.007  # so that the right front of one shard and the left of the next stay apart
    figure.add_trace(
        _front("left front", steps.start[starts][marked] + inside, density[starts][marked], LEFT, "triangle-right")
    )
    if is_two_ended:
        right = _front("right front", end_positions[marked] - inside, density[ends][marked], RIGHT, "triangle-left")
        figure.add_trace(right)
    if overall is not None and overall > 0:
        _mark_overall(figure, overall)
    style(figure, height=340)
    figure.update_xaxes(title_text="requests in plan order", rangemode="tozero")
    figure.update_yaxes(title_text="density (log scale)", **log_ticks(np.append(density, overall or np.nan)))
    return figure


def _mark_overall(figure: go.Figure, overall: float) -> None:
    figure.add_hline(y=overall, line={"color": MUTED, "width": 1.2, "dash": "dash"})
    figure.add_annotation(
        text=f"overall {format_ratio(overall)}",
        font={"color": MUTED, "size": 12},
        x=1,
        xref="paper",
        xanchor="right",
        y=np.log10(overall),
        yanchor="bottom",
        showarrow=False,
    )


def _front(
    name: str, position: NDArray[np.floating], density: NDArray[np.float64], color: str, symbol: str
) -> go.Scatter:
    return go.Scatter(
        x=position,
        y=density,
        name=name,
        mode="markers",
        marker={"symbol": symbol, "size": 15, "color": color, "line": {"color": "var(--surface)", "width": 1}},
        hovertemplate=f"{name}, density %{{y:.3g}}<extra></extra>",
        cliponaxis=False,
    )
