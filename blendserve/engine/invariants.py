"""The check of what must always hold. Unlike `assert` it stays on under `python -O`."""

from __future__ import annotations


class InvariantError(AssertionError):
    """The engine contradicts itself: a defect of the engine, not of its input."""


def require(condition: bool, what: str) -> None:
    """Raise InvariantError, saying `what` should have held."""
    if not condition:
        raise InvariantError(f"{what} does not hold. This is a defect of BlendServe; please report it with its log.")
