"""The report of a job as one HTML page: it loads nothing from anywhere and shows no prompt and no completion."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from blendserve.job_folder import JobFolder
from blendserve.manifest import replacing
from blendserve.report.comparison_figures import draw_cached, draw_lengths, draw_seconds
from blendserve.report.density_figure import draw_density
from blendserve.report.job_files import JobFiles, read_job
from blendserve.report.number_format import UNKNOWN, format_count, format_ratio, format_seconds, format_share
from blendserve.report.predicted_usage_figure import draw_predicted_usage
from blendserve.report.prefix_tree_figure import draw_prefix_tree
from blendserve.report.row_errors import group_errors
from blendserve.report.summary import describe_plan, summarize_job
from blendserve.report.usage_figure import draw_usage

_MAX_LISTED_SHARDS = 100


@dataclass(frozen=True, slots=True)
class StepTime:
    """How long a step of the job took, and its part of the longest one's time."""

    name: str
    seconds: float
    share: float


def write_report(folder: JobFolder) -> None:
    """Write `report.html` from what the job has left behind so far.

    Raises OutputError when the folder holds no job, PlanError when one of its manifests is broken.
    """
    page = _render(read_job(folder))
    with replacing(folder.report) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _render(job: JobFiles) -> str:
    environment = Environment(
        loader=PackageLoader("blendserve", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=format_count, seconds=format_seconds, share=format_share, ratio=format_ratio)
    sentences, warnings = describe_plan(job)
    return environment.get_template("page.html.j2").render(
        name=job.folder.root.name or UNKNOWN,
        header=summarize_job(job),
        sentences=sentences,
        warnings=warnings,
        tree=draw_prefix_tree(job),
        density=draw_density(job),
        predicted=draw_predicted_usage(job),
        comparisons=(draw_seconds(job), draw_lengths(job), draw_cached(job)),
        usage=draw_usage(job),
        runs=job.runs[:_MAX_LISTED_SHARDS],
        num_more_runs=max(len(job.runs) - _MAX_LISTED_SHARDS, 0),
        errors=group_errors(job),
        steps=_step_times(job),
        style=_own_file("page.css"),
        script=_own_file("page.js"),
        plotly=Markup(get_plotlyjs()),  # noqa: S704 - the library itself
    )


def _step_times(job: JobFiles) -> list[StepTime]:
    """The timed steps in the order in which they ran; the shards, which time themselves, count as one."""
    times = dict(job.timings)
    done = [run.done for run in job.shards if run.done is not None]
    if done:
        times["run_shard"] = sum(shard.seconds for shard in done)
    order = ("extract", "tokenize", "analyze", "sample", "plan", "run_shard", "merge")
    known = [name for name in order if name in times] + [name for name in times if name not in (*order, "report")]
    longest = max((times[name] for name in known), default=0.0)
    return [StepTime(name, times[name], times[name] / longest if longest else 0.0) for name in known]


def _own_file(name: str) -> Markup:
    return Markup(resources.files("blendserve.report").joinpath(name).read_text(encoding="utf-8"))  # noqa: S704
