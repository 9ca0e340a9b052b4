"""The head of the report and the plan in words: what was asked, what came of it, what the planner expected."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blendserve.report.job_files import JobFiles
from blendserve.report.number_format import (
    count_of,
    divide,
    format_count,
    format_factor,
    format_ratio,
    format_seconds,
    format_share,
)

_OUTCOMES = (
    ("succeeded", "succeeded"),
    ("failed", "failed"),
    ("rejected", "rejected"),
    ("duplicates_resolved", "duplicates resolved"),
    ("missing", "missing"),
)
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How many rows ended in one way; `key` is its name in the manifest, `share` its part of all rows."""

    key: str
    label: str
    count: int
    share: float


@dataclass(frozen=True, slots=True)
class Header:
    """The report's head. `figures` and `facts` are (label, text) pairs; outcomes is empty before the merge."""

    status: str  # done, incomplete, running
    status_text: str
    has_resumed: bool
    num_rows: int | None
    outcomes: tuple[Outcome, ...]
    is_adding_up: bool
    figures: tuple[tuple[str, str], ...]
    facts: tuple[tuple[str, str], ...]
    versions: tuple[tuple[str, str], ...]


def summarize_job(job: JobFiles) -> Header:
    """What came of the job, as far as it has come."""
    counts = job.manifest.get("counts", {}) if job.manifest else {}
    num_rows = counts.get("input_rows")
    outcomes = tuple(
        Outcome(key, label, counts[key], counts[key] / num_rows if num_rows else 0.0)
        for key, label in _OUTCOMES
        if key in counts
    )
    status, status_text = _status(job, counts)
    return Header(
        status,
        status_text,
        has_resumed(job),
        num_rows,
        outcomes,
        num_rows == sum(outcome.count for outcome in outcomes),
        _figures(job),
        _facts(job),
        tuple(sorted((job.manifest or {}).get("versions", {}).items())),
    )


def _status(job: JobFiles, counts: dict[str, int]) -> tuple[str, str]:
    if job.manifest is None:
        return "running", "not merged yet"
    if job.manifest.get("status") != "done":
        return "incomplete", "incomplete"
    return ("done", "done") if not counts.get("failed") else ("partial", "done, with failed rows")


def _figures(job: JobFiles) -> tuple[tuple[str, str], ...]:
    done = [run.done for run in job.runs if run.done is not None]
    whole = [shard for shard in done if not shard.num_resumed]  # a resumed one may lack some seconds
    seconds = sum(shard.seconds for shard in whole)
    tokens = sum(shard.num_prompt_tokens + shard.num_completion_tokens for shard in whole)
    speed = divide(tokens, seconds)
    totals = (job.manifest or {}).get("tokens", {})
    return (
        ("prompt tokens", format_count(totals.get("num_prompt_tokens"))),
        ("of them from the cache", format_count(totals.get("num_cached_tokens"))),
        ("completion tokens", format_count(totals.get("num_completion_tokens"))),
        ("engine time", format_seconds(sum(shard.seconds for shard in done) if done else None)),
        ("tokens/s of engine time", format_ratio(speed) if speed and speed < 100 else format_count(speed)),
    )


def _facts(job: JobFiles) -> tuple[tuple[str, str], ...]:
    spec = job.record.spec
    devices = sorted({run.done.device for run in job.runs if run.done is not None})
    planned_for = job.plan.hardware if job.plan else spec.hardware
    sampling = "greedy" if spec.temperature == 0 else f"temperature {spec.temperature:g}, seed {spec.seed}"
    if spec.temperature and spec.top_p < 1:
        sampling += f", top-p {spec.top_p:g}"
    if spec.temperature and spec.top_k:
        sampling += f", top-k {spec.top_k}"
    return (
        ("model", _model(spec.model, job.record.model_folder)),
        ("ran on", ", ".join(devices) or "nothing yet"),
        ("planned for", planned_for),
        ("policy", spec.policy),
        ("sampling", f"{sampling}, at most {format_count(spec.max_tokens)} tokens where a row has no limit of its own"),
        ("input", _CREDENTIALS.sub("", spec.input)),
        ("output", _CREDENTIALS.sub("", spec.output)),
        ("fingerprint", job.record.fingerprint),
    )


def _model(name: str, folder: str) -> str:
    return name if Path(name).name == Path(folder).name else f"{name} ({Path(folder).name})"


def has_resumed(job: JobFiles) -> bool:
    """Whether a shard has rows from an earlier attempt, of which the last seconds are lost when it was killed."""
    return any(run.done is not None and run.done.num_resumed > 0 for run in job.runs)


def describe_plan(job: JobFiles) -> tuple[list[str], list[str]]:
    """The plan in sentences, and its warnings. Without a plan both are empty."""
    if job.plan is None:
        return [], []
    summary = job.plan.summary
    sentences = [_size(summary, job)]
    if _planned(summary, job, "num_requests"):
        sentences += [_sharing(summary), _density(summary, is_two_ended=job.plan.is_two_ended), _seconds(summary, job)]
    return [sentence for sentence in sentences if sentence], [str(text) for text in summary.get("warnings") or ()]


def _size(summary: dict[str, Any], job: JobFiles) -> str:
    num_requests, prompt_tokens, output_tokens = (
        _planned(summary, job, name) for name in ("num_requests", "num_prompt_tokens", "estimated_output_tokens")
    )
    text = (
        f"Policy {job.plan.policy if job.plan else '?'} orders {count_of(num_requests, 'request')} with "
        f"{count_of(prompt_tokens, 'prompt token')} and an estimated {count_of(output_tokens, 'output token')} into "
        f"{count_of(summary.get('num_shards', len(job.shards)), 'shard')}"
    )
    duplicates = summary.get("num_duplicates")
    return text + (
        f"; exact duplicates, answered by an equal request: {format_count(duplicates)}." if duplicates else "."
    )


def _planned(summary: dict[str, Any], job: JobFiles, name: str) -> int:
    """What the summary says, or else the sum over the shards."""
    return int(summary.get(name, sum(getattr(run.planned, name) for run in job.shards)))


def _sharing(summary: dict[str, Any]) -> str:
    possible, kept = summary.get("prefix_sharing_optimal"), summary.get("prefix_sharing")
    if possible is None or kept is None:
        return ""
    if not summary.get("has_prefix_cache", True):
        return "There is no prefix cache, so no prefix is shared."
    if possible == 0:
        return "No two of them begin alike, so no prefix can be shared."
    return (
        f"{format_share(possible)} of the prompt tokens repeat a prefix that another request has too; the plan keeps "
        f"{format_share(kept)}, which is {format_share(kept / possible)} of what is possible."
    )


def _density(summary: dict[str, Any], *, is_two_ended: bool) -> str:
    overall, left, right = (summary.get(name) for name in ("density", "density_left", "density_right"))
    if overall is None:
        return ""
    bound = "compute-bound" if overall >= 1 else "memory-bound"
    text = f"Compute takes {format_ratio(overall)} times as long as memory traffic, so the job as a whole is {bound}"
    if left is None or right is None:
        return text + "."
    ends = "the plan works inwards from both ends" if is_two_ended else "the plan runs from one end to the other"
    return f"{text}; {ends}, density {format_ratio(left)} on the left and {format_ratio(right)} on the right."


def _seconds(summary: dict[str, Any], job: JobFiles) -> str:
    predicted = summary.get("predicted_seconds")
    if predicted is None:
        return ""
    gpus = job.record.spec.gpus
    text = f"It should take {format_seconds(predicted)}{f', summed over {gpus} GPUs' if gpus > 1 else ''}"
    if (bound := summary.get("bound_seconds")) is not None:
        text += f" (the bound, with perfect sharing and overlap, is {format_seconds(bound)})"
    done = [run.done for run in job.shards if run.done is not None]
    if not done or len(done) < len(job.shards):
        return f"{text}; {len(done)} of {len(job.shards)} shards have run."
    real = sum(shard.seconds for shard in done)
    text += f" and took {format_seconds(real)}, {format_factor(divide(real, predicted))} the prediction"
    return text + (" (without the last 30 seconds of attempts that were killed)." if has_resumed(job) else ".")
