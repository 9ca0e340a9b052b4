"""Resource use over time: what the engine's steps held and did, over all shards, one after another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import pyarrow.parquet as pq
from numpy.typing import NDArray
from plotly.subplots import make_subplots

from blendserve.manifest import StepCosts
from blendserve.report.figure_style import (
    INK,
    LEFT,
    LEFT_AREA,
    MUTED,
    PLANNED,
    RIGHT,
    RIGHT_AREA,
    SECONDS_AXIS,
    Chart,
    style,
)
from blendserve.report.job_files import JobFiles, ShardRun, read_columns
from blendserve.report.number_format import count_of, format_seconds

_TITLE = "Resource use over time"
_MAX_POINTS = 600  # every other pixel of the page
_MAX_MARKED_RUNS = 12
_PANELS = (
    "tokens per step",
    "running requests",
    "KV cache blocks in use",
    "work per step, of its time",
    "time per step",
)
_HOVER = ("%{y:,.1~f}", "%{y:,.1~f}", "%{y:,.1~f}", "%{y:.0%}", "%{y:.3~s}s")  # a value of each panel
_SUMMED = (
    "num_prefill_tokens",
    "num_decode_tokens",
    "num_running",
    "num_running_left",
    "num_used_blocks",
    "num_total_blocks",
    "kv_read_bytes",
    "step_seconds",
)
_SHARES = ("compute_share", "memory_share")


@dataclass(frozen=True, slots=True)
class Timeline:
    """Metrics averaged over pieces of time; `seconds` and every column of `means` are [num_points].

    run_starts: (name, second at which it begins) of every run that has steps, laid end to end.
    """

    seconds: NDArray[np.float64]
    means: dict[str, NDArray[np.float64]]
    max_step_seconds: NDArray[np.float64]
    run_starts: tuple[tuple[str, float], ...]
    num_steps: int
    num_preempted: int
    num_seconds: float


def draw_usage(job: JobFiles) -> Chart:
    """The chart of every `metrics.parquet`, at most 600 points in time."""
    timeline = read_timeline(job)
    if timeline is None:
        return Chart.missing("usage", _TITLE, "No shard has left step metrics, so there is nothing to draw.")
    caption = (
        f"What the engine did in {count_of(timeline.num_steps, 'step')} over {format_seconds(timeline.num_seconds)}"
        f"{', all runs laid end to end' if len(timeline.run_starts) > 1 else ''}: where blending works, prefill and "
        "decode tokens share the steps all the way through, both fronts are running and the cache is kept full. "
        "Work is what the plan says of a step's tokens and KV cache reads; where it overlaps, both kinds together are "
        "more than the step's time"
    )
    caption += f" ({count_of(timeline.num_preempted, 'preemption')})."
    return Chart.drawn("usage", _TITLE, caption, _figure(timeline))


def read_timeline(job: JobFiles) -> Timeline | None:
    """The steps of all runs on one time axis, or None where none left metrics."""
    runs = [run for run in job.runs if run.metrics.is_file() and pq.read_metadata(run.metrics).num_rows]
    if not runs:
        return None
    seconds = [_num_seconds(run) for run in runs]
    begins = np.cumsum([0.0, *seconds[:-1]])
    points = list(_points(runs, begins, seconds))
    return Timeline(
        seconds=np.concatenate([point["started_seconds"] for point in points]),
        means={name: np.concatenate([point[name] for point in points]) for name in (*_SUMMED, *_SHARES)},
        max_step_seconds=np.concatenate([point["max_step_seconds"] for point in points]),
        run_starts=tuple((run.name, float(begin)) for run, begin in zip(runs, begins, strict=True)),
        num_steps=sum(pq.read_metadata(run.metrics).num_rows for run in runs),
        num_preempted=sum(int(read_columns(run.metrics, "num_preempted")[0].sum()) for run in runs),
        num_seconds=sum(seconds),
    )


def _num_seconds(run: ShardRun) -> float:
    started, took = read_columns(run.metrics, "started_seconds", "step_seconds")
    return float((started + took).max())


def _points(
    runs: list[ShardRun], begins: NDArray[np.float64], seconds: list[float]
) -> Iterator[dict[str, NDArray[np.float64]]]:
    """One run at a time, so that memory is bounded by the largest; each gets points by its share of the time."""
    for run, begin, run_seconds in zip(runs, begins, seconds, strict=True):
        max_points = max(int((_MAX_POINTS - len(runs)) * run_seconds / max(sum(seconds), 1e-9)), 1)
        names = ("started_seconds", *_SUMMED)
        columns = dict(zip(names, read_columns(run.metrics, *names), strict=True))
        starts = _pieces(columns["started_seconds"], run_seconds, max_points)
        sizes = np.diff(np.append(starts, len(columns["started_seconds"])))
        point = {name: np.add.reduceat(columns[name].astype(np.float64), starts) / sizes for name in _SUMMED}
        point |= _work_shares(point, run.step_costs)
        point["started_seconds"] = columns["started_seconds"][starts] + begin
        point["max_step_seconds"] = np.maximum.reduceat(columns["step_seconds"], starts)
        yield point


def _work_shares(point: dict[str, NDArray[np.float64]], costs: StepCosts | None) -> dict[str, NDArray[np.float64]]:
    """Compute and memory seconds by the plan, of a second of time; not a number where the plan doesn't say."""
    if costs is None:
        unknown = np.full(len(point["step_seconds"]), np.nan)
        return dict.fromkeys(_SHARES, unknown)
    decodes, seconds = point["num_decode_tokens"], np.maximum(point["step_seconds"], 1e-9)
    compute = (
        point["num_prefill_tokens"] + decodes
    ) * costs.seconds_per_token + decodes * costs.seconds_per_sampled_token
    return {
        "compute_share": compute / seconds,
        "memory_share": point["kv_read_bytes"] * costs.seconds_per_kv_byte / seconds,
    }


def _pieces(started: NDArray[np.float64], seconds: float, max_pieces: int) -> NDArray[np.int64]:
    """Indices of the steps that begin a piece: every step, or the first one in each of `max_pieces` equal times."""
    if len(started) <= max_pieces:
        return np.arange(len(started))
    piece = np.minimum((started / max(seconds, 1e-9) * max_pieces).astype(np.int64), max_pieces - 1)
    return np.flatnonzero(np.diff(piece, prepend=-1) > 0)


def _figure(timeline: Timeline) -> go.Figure:
    figure = make_subplots(rows=len(_PANELS), cols=1, shared_xaxes=True, vertical_spacing=0.055, subplot_titles=_PANELS)
    seconds = np.append(timeline.seconds, timeline.num_seconds)
    is_every_step = len(timeline.seconds) == timeline.num_steps
    for row, (name, label, line, area, is_stacked) in _series():
        if is_every_step and name == "max_step_seconds":
            continue  # the same as the mean
        values = _values(timeline, name)
        values = np.append(values, values[-1])
        figure.add_trace(
            go.Scatter(
                x=seconds,
                y=values,
                name=label,
                legend="legend" if row == 1 else f"legend{row}",
                mode="lines",
                line={"color": line, "width": 1.2, "shape": "hv" if len(values) < 200 else "linear"},
                fill=None if area is None else "tonexty" if is_stacked else "tozeroy",
                fillcolor=area,
                stackgroup=f"panel {row}" if is_stacked else None,
                hovertemplate=f"{_HOVER[row - 1]} {label}<extra></extra>",
            ),
            row=row,
            col=1,
        )
    style(figure, height=170 * len(_PANELS), hovermode="x unified", **_legends())
    figure.update_annotations(x=0, xanchor="left", font={"size": 13, "color": INK})
    figure.update_yaxes(rangemode="tozero", tickformat="~s", nticks=5)
    figure.update_yaxes(tickformat=".0%", row=4, col=1)
    figure.update_yaxes(ticksuffix="s", row=len(_PANELS), col=1)
    figure.update_xaxes(**SECONDS_AXIS)
    figure.update_xaxes(title_text="seconds of engine time", row=len(_PANELS), col=1)
    if len(timeline.run_starts) > 1:
        _mark_runs(figure, timeline)
    return figure


def _mark_runs(figure: go.Figure, timeline: Timeline) -> None:
    """A line through all panels where a run begins, and its name above the tokens of the first panel."""
    for name, begin in timeline.run_starts[:_MAX_MARKED_RUNS]:
        figure.add_vline(x=begin, line={"color": MUTED, "width": 1, "dash": "dot"})
        font = {"color": MUTED, "size": 11}
        figure.add_annotation(
            x=begin, y=1, yref="y domain", text=name, font=font, showarrow=False, xanchor="left", yanchor="top"
        )
    most_tokens = (timeline.means["num_prefill_tokens"] + timeline.means["num_decode_tokens"]).max()
    figure.update_yaxes(range=[0, 1.3 * most_tokens], row=1, col=1)


def _series() -> list[tuple[int, tuple[str, str, str, str | None, bool]]]:
    """(panel, (values, label, line, area, is_stacked))"""
    return [
        (1, ("num_prefill_tokens", "prefill", LEFT, LEFT_AREA, True)),
        (1, ("num_decode_tokens", "decode", RIGHT, RIGHT_AREA, True)),
        (2, ("num_running_left", "left front", LEFT, LEFT_AREA, True)),
        (2, ("num_running_right", "right front", RIGHT, RIGHT_AREA, True)),
        (3, ("num_used_blocks", "in use", LEFT, LEFT_AREA, False)),
        (3, ("num_total_blocks", "there are", MUTED, None, False)),
        (4, ("compute_share", "compute", LEFT, None, False)),
        (4, ("memory_share", "memory", RIGHT, None, False)),
        (5, ("max_step_seconds", "longest", PLANNED, None, False)),
        (5, ("step_seconds", "mean", INK, None, False)),
    ]


def _values(timeline: Timeline, name: str) -> NDArray[np.float64]:
    if name == "num_running_right":
        return timeline.means["num_running"] - timeline.means["num_running_left"]
    return timeline.max_step_seconds if name == "max_step_seconds" else timeline.means[name]


def _legends() -> dict[str, object]:
    """A legend beside the title of every panel."""
    height = (1 - 0.055 * (len(_PANELS) - 1)) / len(_PANELS)
    legends: dict[str, object] = {}
    for panel in range(len(_PANELS)):
        top = 1 - panel * (height + 0.055)
        legends["legend" if panel == 0 else f"legend{panel + 1}"] = {
            "orientation": "h",
            "x": 1,
            "xanchor": "right",
            "y": top,
            "yanchor": "bottom",
            "font": {"color": MUTED, "size": 12},
            "bgcolor": "rgba(0,0,0,0)",
            "traceorder": "normal",
        }
    return legends
