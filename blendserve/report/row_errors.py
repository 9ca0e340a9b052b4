"""Failed and rejected rows, grouped by reason. What a message quotes from a row is left out: it may be a prompt."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import pyarrow.compute as pc
import pyarrow.dataset as pads

from blendserve.report.job_files import JobFiles

# As Python quotes, which escapes what would end the quote; an apostrophe within a word begins none.
_QUOTED = re.compile(r"(?<!\w)'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")
_MAX_REASONS = 30
_MAX_CHARACTERS = 240


@dataclass(frozen=True, slots=True)
class Reason:
    """Why rows have no completion: `outcome` is failed or rejected; numbers in `text` are replaced by N."""

    outcome: str
    text: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class RowErrors:
    """The most frequent reasons, and how many rows have another one."""

    reasons: tuple[Reason, ...]
    num_others: int


def group_errors(job: JobFiles) -> RowErrors | None:
    """The reasons of all rows without a completion, or None before the merge."""
    files = [str(path) for path in sorted(job.folder.results.glob("*.parquet"))]
    if not files:
        return None
    results = pads.dataset(files, format="parquet")
    column_names = frozenset(results.schema.names)
    counts: Counter[tuple[str, str]] = Counter()
    rows = results.to_batches(
        columns=["finish_reason", "error"], filter=pads.field("finish_reason").isin(["error", "rejected"])
    )
    for batch in rows:
        texts = pc.replace_substring_regex(pc.fill_null(batch.column("error"), "no reason given"), r"\d+", "N")
        for outcome in ("rejected", "error"):
            chosen = texts.filter(pc.equal(batch.column("finish_reason"), outcome))
            for entry in pc.value_counts(chosen).to_pylist():
                text = _without_quotes(entry["values"], column_names)
                counts["failed" if outcome == "error" else "rejected", text] += entry["counts"]
    shown = counts.most_common(_MAX_REASONS)
    return RowErrors(
        tuple(Reason(outcome, text, num_rows) for (outcome, text), num_rows in shown),
        counts.total() - sum(num_rows for _, num_rows in shown),
    )


def _without_quotes(message: str, kept: frozenset[str]) -> str:
    """The message with everything quoted taken out but names of columns, and cut to a line's length."""
    text = _QUOTED.sub(lambda found: found[0] if found[0][1:-1] in kept else "‘…’", message)
    text = " ".join(text.split())
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + "…"
