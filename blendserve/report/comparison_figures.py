"""The plan against reality: seconds of every shard, output lengths, prompt tokens found in the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import pyarrow.compute as pc
import pyarrow.dataset as pads
from numpy.typing import NDArray

from blendserve.report.figure_style import MUTED, PLANNED, REAL, Chart, log_ticks, style
from blendserve.report.job_files import JobFiles, ShardRun, read_columns
from blendserve.report.number_format import (
    count_of,
    divide,
    format_count,
    format_factor,
    format_seconds,
    format_share,
)
from blendserve.report.summary import has_resumed
from blendserve.schemas import COMPLETIONS

_SECONDS = "Seconds of every shard"
_LENGTHS = "Output length, estimated and real"
_CACHED = "Prompt tokens found in the cache"
_MAX_BINS = 24
_NOT_RUN = "No shard has run to its end yet, so there is nothing to compare."


def draw_seconds(job: JobFiles) -> Chart:
    """Predicted and real seconds of the sample and of every finished shard."""
    runs = [run for run in job.runs if run.done is not None]
    if not runs:
        return Chart.missing("seconds", _SECONDS, _NOT_RUN)
    predicted = np.array([run.planned.predicted_seconds for run in runs])
    real = np.array([run.done.seconds for run in runs if run.done is not None])
    ratio = divide(float(real.sum()), float(predicted.sum()))
    caption = (
        f"What running each shard should have taken and what it took: in all{_with_sample(runs)} "
        f"{format_seconds(predicted.sum())} predicted and {format_seconds(real.sum())} real, {format_factor(ratio)} "
        "the prediction"
    )
    if has_resumed(job):
        caption += "; a shard that was resumed may lack the last 30 seconds of an attempt that was killed"
    return Chart.drawn("seconds", _SECONDS, caption + ".", _pairs(runs, predicted, real, "seconds", format_seconds))


def draw_cached(job: JobFiles) -> Chart:
    """Share of each shard's prompt tokens that was found in the cache, planned and real."""
    runs = [run for run in job.runs if run.done is not None and run.done.num_prompt_tokens and run.schedule.is_file()]
    if not runs:
        return Chart.missing("cached", _CACHED, _NOT_RUN)
    shared = np.array([read_columns(run.schedule, "shared_prefix_tokens")[0].sum() for run in runs], np.int64)
    prompts = np.array([run.done.num_prompt_tokens for run in runs if run.done is not None])
    cached = np.array([run.done.num_cached_tokens for run in runs if run.done is not None])
    caption = (
        f"In all{_with_sample(runs)} the plan's order lets {format_share(shared.sum() / prompts.sum())} of the prompt "
        f"tokens be reused, and {format_share(cached.sum() / prompts.sum())} were found in the cache (it keeps whole "
        "blocks, so a little less is normal; more means that another request had computed them before)."
    )
    figure = _pairs(runs, shared / prompts, cached / prompts, "share of prompt tokens", format_share)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    return Chart.drawn("cached", _CACHED, caption, figure)


def _with_sample(runs: list[ShardRun]) -> str:
    """What sums over `runs` hold beside the plan's shards."""
    return ", the sample included," if any(run.is_sample for run in runs) else ""


def _pairs(
    runs: list[ShardRun],
    planned: NDArray[np.float64],
    real: NDArray[np.float64],
    unit: str,
    format_value: Callable[[float], str],
) -> go.Figure:
    names = [run.name for run in runs]
    gap = 1 - 2 * min(0.08 * len(runs), 0.38)  # few shards don't make broad bars
    bars = [
        go.Bar(
            x=names,
            y=values,
            name=name,
            marker={"color": color},
            customdata=[format_value(value) for value in values.tolist()],
            hovertemplate=f"%{{x}}<br>{name}: %{{customdata}}<extra></extra>",
        )
        for name, values, color in (("planned", planned, PLANNED), ("real", real, REAL))
    ]
    figure = style(go.Figure(bars), height=300, barmode="group", bargap=gap)
    figure.update_yaxes(title_text=unit, rangemode="tozero")
    figure.update_xaxes(type="category", nticks=40)
    return figure


@dataclass(frozen=True, slots=True)
class LengthBins:
    """Finished requests by estimated output length; every array is [num_bins], lengths in tokens."""

    num_requests: NDArray[np.int64]
    estimated: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]  # a tenth of the requests is shorter
    high: NDArray[np.float64]  # a tenth is longer


def draw_lengths(job: JobFiles) -> Chart:
    """Real output length by estimated output length, over the requests of the shards."""
    path = job.folder.relation("output_length_estimates")
    if not path.is_file():
        return Chart.missing("lengths", _LENGTHS, "The job has not been planned yet, so there are no estimates.")
    estimated, real = _match_lengths(job)
    if len(real) == 0:
        return Chart.missing("lengths", _LENGTHS, "No planned request is finished yet, so there is nothing to compare.")
    column = pads.dataset(path).to_table(columns=["source"]).column("source")
    sources = {str(entry["values"]): entry["counts"] for entry in pc.value_counts(column).to_pylist()}
    caption = (
        f"Dots are the mean of {count_of(len(real), 'finished request')} by estimate, the bars hold the middle "
        f"80 % of them and the dashed line is a perfect estimate; in all, real output was "
        f"{format_factor(divide(float(real.sum()), float(estimated.sum())))} the estimate (estimates come from: "
        f"{', '.join(f'{source} {format_count(count)}' for source, count in sorted(sources.items()))})."
    )
    return Chart.drawn("lengths", _LENGTHS, caption, _length_figure(_bin_lengths(estimated, real)))


def _match_lengths(job: JobFiles) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Estimated and real output tokens [num_finished] of the requests that ran in a shard."""
    rows, estimates = read_columns(
        job.folder.relation("output_length_estimates"), "row_index", "estimated_output_tokens"
    )
    files = [str(path) for run in job.shards for path in run.completion_files]
    finished = pads.dataset(files, schema=COMPLETIONS, format="parquet").to_table(
        columns=["row_index", "num_completion_tokens"], filter=pads.field("finish_reason") != "error"
    )
    finished_rows = finished.column("row_index").to_numpy()
    order = np.argsort(rows)
    place = np.searchsorted(rows[order], finished_rows)
    is_known = place < len(rows)
    is_known[is_known] = rows[order][place[is_known]] == finished_rows[is_known]
    real = finished.column("num_completion_tokens").to_numpy()[is_known]
    return estimates[order][place[is_known]].astype(np.int64), real.astype(np.int64)


def _bin_lengths(estimated: NDArray[np.int64], real: NDArray[np.int64]) -> LengthBins:
    edges = np.unique(estimated)
    if len(edges) > _MAX_BINS:
        edges = np.unique(np.quantile(estimated, np.linspace(0, 1, _MAX_BINS + 1)[:-1], method="lower"))
    order = np.lexsort((real, estimated))
    starts = np.searchsorted(estimated[order], edges)
    groups = list(zip(np.split(estimated[order], starts[1:]), np.split(real[order], starts[1:]), strict=True))
    low, high = zip(*(np.quantile(lengths, (0.1, 0.9)) for _, lengths in groups), strict=True)
    return LengthBins(
        np.array([len(lengths) for _, lengths in groups]),
        np.array([estimates.mean() for estimates, _ in groups]),
        np.array([lengths.mean() for _, lengths in groups]),
        np.array(low),
        np.array(high),
    )


def _length_figure(bins: LengthBins) -> go.Figure:
    top = float(max(bins.estimated.max(), bins.high.max()))
    bottom = float(max(min(bins.estimated.min(), bins.low.min()), 1.0))
    is_log = top / bottom > 30
    ends = [bottom if is_log else 0.0, top]
    dots = go.Scatter(
        x=bins.estimated,
        y=bins.mean,
        mode="markers",
        name="real",
        marker={
            "color": REAL,
            "size": 8 + 14 * np.sqrt(bins.num_requests / bins.num_requests.max()),
            "line": {"color": "var(--surface)", "width": 1},
        },
        error_y={
            "array": np.maximum(bins.high - bins.mean, 0),
            "arrayminus": np.maximum(bins.mean - bins.low, 0),
            "color": REAL,
            "thickness": 1.4,
            "width": 4,
        },
        customdata=np.stack([bins.num_requests, bins.low, bins.high], axis=1),
        hovertemplate=(
            "estimated %{x:,.0f} tokens<br>real %{y:,.1f} on average, mostly %{customdata[1]:,.0f} to "
            "%{customdata[2]:,.0f}<br>requests: %{customdata[0]:,}<extra></extra>"
        ),
        showlegend=False,
    )
    perfect = go.Scatter(
        x=ends, y=ends, mode="lines", line={"color": MUTED, "width": 1.2, "dash": "dash"}, hoverinfo="skip",
        showlegend=False,
    )  # fmt: skip
    figure = style(go.Figure([perfect, dots]), height=340)
    scale = log_ticks(np.array(ends)) if is_log else {"type": "linear"}
    figure.update_xaxes(title_text="estimated output tokens", showgrid=True, **scale)
    figure.update_yaxes(title_text="real output tokens", **scale)
    return figure
