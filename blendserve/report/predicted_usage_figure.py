"""What the job would use of compute and memory over time, by policy: the simulator's answer."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from blendserve.report.figure_style import INK, LEFT, MUTED, RIGHT, SECONDS_AXIS, Chart, style
from blendserve.report.job_files import JobFiles, read_columns
from blendserve.report.number_format import format_seconds

_TITLE = "Predicted use of compute and memory"
_NAMES = {
    "blend": "blend",
    "dfs": "depth first",
    "fcfs": "first come, first served",
    "random": "random order",
    "longest": "longest first",
}
_SERIES = (
    ("compute_share", "compute", LEFT, 1.4),
    ("memory_share", "memory bandwidth", RIGHT, 1.4),
    ("cache_share", "KV cache held", MUTED, 1.0),
)
_GAP = 0.3  # of the height, divided among the panels


def draw_predicted_usage(job: JobFiles) -> Chart:
    """The chart of `predicted_usage`: one panel a policy on one time axis."""
    path = job.folder.relation("predicted_usage")
    if not path.is_file():
        return Chart.missing("predicted-usage", _TITLE, "The job has not been planned yet.")
    columns = ("policy", "started_seconds", *(name for name, *_ in _SERIES))
    table = dict(zip(columns, read_columns(path, *columns), strict=True))
    policies = [policy for policy in _NAMES if np.any(table["policy"] == policy)]
    if not policies:
        reason = "Nothing was simulated: nothing is left to run, or the weights leave no room for a KV cache."
        return Chart.missing("predicted-usage", _TITLE, reason)
    titles = [_NAMES[policy] for policy in policies]
    gap = _GAP / len(policies)
    figure = make_subplots(rows=len(policies), cols=1, shared_xaxes=True, vertical_spacing=gap, subplot_titles=titles)
    ends = {}
    for row, policy in enumerate(policies, start=1):
        is_here = table["policy"] == policy
        seconds = table["started_seconds"][is_here]
        ends[policy] = float(seconds[-1] + (seconds[1] - seconds[0] if len(seconds) > 1 else 0.0))
        for name, label, color, width in _SERIES:
            line = go.Scatter(
                x=seconds,
                y=table[name][is_here],
                name=label,
                legendgroup=name,
                showlegend=row == 1,
                mode="lines",
                line={"color": color, "width": width},
                hovertemplate=f"%{{y:.0%}} {label}<extra></extra>",
            )
            figure.add_trace(line, row=row, col=1)
    style(figure, height=190 * len(policies) + 40, hovermode="x unified")
    figure.update_annotations(x=0, xanchor="left", font={"size": 13, "color": INK})
    figure.update_layout(legend={"x": 1, "xanchor": "right"})  # beside the first panel's name
    figure.update_yaxes(range=[0, 1.05], tickformat=".0%", nticks=4)
    figure.update_xaxes(**SECONDS_AXIS)
    figure.update_xaxes(title_text="seconds", row=len(policies), col=1)
    return Chart.drawn("predicted-usage", _TITLE, _caption(ends), figure)


def _caption(ends: dict[str, float]) -> str:
    times = ", ".join(f"{_NAMES[policy]} {format_seconds(end)}" for policy, end in ends.items())
    return (
        "The whole job on one device by simulation, each request as long as it is estimated to be: how much of the "
        f"time each resource works ({times}). A blend keeps both lines up until the end; depth first uses one after "
        "the other."
    )
