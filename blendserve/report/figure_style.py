"""The look that all figures share, and how a figure becomes data inside the page.

Colours are names of the page's CSS variables, such as `var(--left)`; the page's script puts in their values for light
or dark mode, so that a colour is defined once, in page.css.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup
from numpy.typing import NDArray

from blendserve.report.number_format import format_ratio

INK, MUTED, LINE = "var(--ink)", "var(--muted)", "var(--line)"
LEFT, RIGHT = "var(--left)", "var(--right)"  # compute-heavy and memory-heavy: the two fronts of the plan
LEFT_AREA, RIGHT_AREA = "var(--left-area)", "var(--right-area)"
PLANNED, REAL = "var(--planned)", "var(--left)"
MAX_POINTS = 2_000
# Five digits are as many as anyone can tell apart on an axis; tooltips have the unit too.
SECONDS_AXIS = {"hoverformat": ",.5~r", "ticksuffix": " s", "showticksuffix": "last"}
_SAME = 1.001  # times as much
_LEAST_TICKS = 3  # that are seen

_AXIS = {
    "gridcolor": LINE,
    "linecolor": LINE,
    "zeroline": False,
    "ticks": "",
    "tickfont": {"color": MUTED, "size": 12},
    "title": {"font": {"color": MUTED, "size": 12}, "standoff": 10},
    "automargin": True,
}
_IN_SCRIPT = {"&": "\\u0026", "<": "\\u003c", ">": "\\u003e", "\u2028": "\\u2028", "\u2029": "\\u2029"}


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure, or the reason why there is none, beside the one sentence that explains it.

    `data` is the figure as JSON that is safe inside a script element.
    """

    name: str
    title: str
    caption: str
    data: Markup | None
    label: str  # what a screen reader says

    @classmethod
    def drawn(cls, name: str, title: str, caption: str, figure: go.Figure) -> Chart:
        return cls(name, title, caption, _as_script_data(figure), f"Figure: {title}")

    @classmethod
    def missing(cls, name: str, title: str, reason: str) -> Chart:
        return cls(name, title, reason, None, title)


def style(figure: go.Figure, *, height: int, **layout: Any) -> go.Figure:
    """Give a finished figure the report's look; `layout` is what this figure wants otherwise."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 8, "r": 8, "t": 28, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13, "color": INK},
        hoverlabel={"bgcolor": "var(--surface)", "bordercolor": LINE, "font": {"color": INK, "size": 12.5}},
        legend={"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "font": {"color": MUTED}},
    )
    figure.update_xaxes(**_AXIS, showgrid=False)
    figure.update_yaxes(**_AXIS)
    figure.update_layout(**layout)
    return figure


def log_ticks(values: NDArray[np.floating]) -> dict[str, Any]:
    """Options of a logarithmic axis: ticks at 1, 2 and 5 of every decade where there are few but some, at the value
    where there is one, else plotly's own."""
    known = values[np.isfinite(values) & (values > 0)]
    if len(known) == 0 or known.max() > 1000 * known.min():
        return {"type": "log", "nticks": 8, "exponentformat": "power"}
    if known.max() < _SAME * known.min():
        return {"type": "log", "tickvals": [known.max()], "ticktext": [format_ratio(known.max())]}
    decades = np.arange(np.floor(np.log10(known.min())), np.ceil(np.log10(known.max())) + 1)
    places = np.outer(10.0**decades, (1, 2, 5)).ravel()
    if np.count_nonzero((places >= known.min()) & (places <= known.max())) < _LEAST_TICKS:
        return {"type": "log", "nticks": 6}
    return {"type": "log", "tickvals": places, "ticktext": [format_ratio(place) for place in places]}


def _as_script_data(figure: go.Figure) -> Markup:
    text = figure.to_json(validate=False)
    for character, escape in _IN_SCRIPT.items():
        text = text.replace(character, escape)
    return Markup(text)  # noqa: S704 - every character that could end the script element is escaped above
