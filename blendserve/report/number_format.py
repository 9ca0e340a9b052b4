"""How the report writes numbers for people: counts, seconds, shares and densities. What is unknown is a dash."""

from __future__ import annotations

import math

UNKNOWN = "–"
_LARGE = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def format_count(value: float | None) -> str:
    """1,234 up to a million, then 1.23 M."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    for size, letter in _LARGE:
        if abs(value) >= size:
            return f"{value / size:,.2f} {letter}"
    return f"{round(value):,}"


def count_of(value: float, noun: str) -> str:
    """1 request, 1,234 requests."""
    return f"{format_count(value)} {noun}{'' if value == 1 else 's'}"


def format_seconds(value: float | None) -> str:
    """340 ms, 4.21 s, 3 min 20 s, 2 h 05 min."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value < 0.9995:
        return f"{value * 1e3:.3g} ms"
    if value < 99.95:
        return f"{value:.3g} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def format_share(value: float | None) -> str:
    """0.351 as 35.1 %."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value * 100:.1f} %"


def format_ratio(value: float | None) -> str:
    """Three significant digits, or all before the point: 1.27, 0.0962, 54.9, 12,346."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:,.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def format_factor(value: float | None) -> str:
    """How many times as much: 0.98×, 1.27×, 23.6×."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    return f"{value:.2f}×" if value < 9.995 else f"{format_ratio(value)}×"


def divide(numerator: float | None, denominator: float | None) -> float | None:
    """The quotient, or None where it has no meaning."""
    return None if numerator is None or not denominator else numerator / denominator
