"""The job, step by step: the page to read first.

    extract → tokenize → analyze → sample → plan → run_shard … → merge → report → finish

Each step is a function that the command line and the Airflow tasks both call. A step reads what the steps before it
left in the job's folder (see `JobFolder`) and leaves its own files there, whole or not at all. A step whose files are
there is done: calling it again only reports, which is what makes a job that was killed anywhere go on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from blendserve.engine_process import Progress, find_plan, run_shard_process
from blendserve.errors import ReconciliationError
from blendserve.extract import extract_requests
from blendserve.finished_job import is_finished, read_final_manifest
from blendserve.finished_job import show as show
from blendserve.gpus import check_gpus, run_shards
from blendserve.job_folder import JobFolder
from blendserve.job_record import JobRecord, claim, holding, read_record, versions, writing_to
from blendserve.lease import Lease
from blendserve.manifest import PlanManifest, ShardManifest, read_json, read_manifest, replacing, write_manifest
from blendserve.merge import merge_results
from blendserve.preflight import ExaminedJob, examine
from blendserve.spec import JobSpec
from blendserve.step import step, timings
from blendserve.working_copy import is_url, working_copy

Announce = Callable[[str, dict[str, Any]], None]

_PREVIEW = "is_preview"  # marks a plan that was made before any request ran


def run(
    spec: JobSpec,
    *,
    on_step: Announce | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Run the whole job, or what is left of it, and return its manifest.

    On a finished job this does nothing but return the manifest with `already_done` set.
    """
    announce = on_step or (lambda _step, _result: None)
    with _held(spec) as (examined, lease):
        folder = examined.folder
        check_gpus(spec.gpus)
        announce("extract", _extract(examined))
        if is_finished(folder):
            return {**read_final_manifest(folder), "already_done": True}
        announce("tokenize", tokenize(folder.root))
        announce("analyze", analyze(folder.root))
        announce("sample", run_sample(folder.root, on_progress=on_progress))
        made = plan(folder.root)
        announce("plan", made.summary)
        for done in run_shards(folder.plan, range(len(made.shards)), gpus=spec.gpus, on_progress=on_progress):
            announce("run_shard", done.model_dump(mode="json"))
        announce("merge", merge(folder.root, lease))
        announce("report", {"report": str(report(folder.root))})
        return finish(folder.root)


def preview(spec: JobSpec, *, on_step: Announce | None = None) -> tuple[PlanManifest, dict[str, Any]]:
    """Plan the job without running anything: the plan, and what each policy would take.

    A later `run` plans again, with the lengths that its sample shows.
    """
    announce = on_step or (lambda _step, _result: None)
    with _held(spec) as (examined, _):
        folder = examined.folder
        announce("extract", _extract(examined))
        announce("tokenize", tokenize(folder.root))
        announce("analyze", analyze(folder.root))
        made = plan(folder.root, is_preview=True)
        announce("plan", made.summary)
        return made, _compare(folder.root)


def preflight(spec: JobSpec, root: Path | None = None) -> dict[str, Any]:
    """Check all that can be checked before any work starts: input, columns, template, model, output folder (at `root`).

    Raises InputError, UsageError, ModelError or OutputError; changes nothing but creating the output folder.
    """
    examined = examine(spec, root)
    return {
        "num_files": len(examined.files.paths),
        "num_rows": examined.files.num_rows,
        "architecture": examined.architecture,
        "model_folder": examined.record.model_folder,
        "output": spec.output,
    }


def extract(spec: JobSpec, root: Path | None = None, *, begun_by: str | None = None) -> dict[str, Any]:
    """Claim the output folder; copy the input rows and make a request of each: `input_rows`, `requests`.

    `begun_by`: the name of a run, in which `force` discards an earlier job once only.
    """
    return _extract(examine(spec, root), begun_by)


def tokenize(root: Path) -> dict[str, Any]:
    """Turn prompts into token ids: `tokenized_requests`, and `rejected_requests` for rows that can't run."""
    from blendserve.tokenizer import PromptTokenizer, tokenize_requests

    folder, record = _open(root)
    with step(folder, "tokenize", "tokenized_requests", "rejected_requests") as is_done:
        if not is_done:
            tokenize_requests(folder, PromptTokenizer.load(Path(record.model_folder), record.spec))
    return {
        "num_requests": _num_rows(folder, "tokenized_requests"),
        "num_rejected": _num_rows(folder, "rejected_requests"),
    }


def analyze(root: Path) -> dict[str, Any]:
    """Sort the requests into their prefix tree: `sorted_requests`, `prefix_nodes`."""
    from blendserve.planner.analyze import analyze as analyze_prefixes

    folder, record = _open(root)
    summary = folder.work / "prefix_summary.json"
    with step(folder, "analyze", "sorted_requests", "prefix_nodes") as is_done:
        if not is_done or not summary.is_file():
            found = analyze_prefixes(folder, dedupe=record.spec.temperature == 0.0)
            write_manifest(summary, asdict(found))
    return read_json(summary)


def choose_sample(root: Path) -> dict[str, Any]:
    """Choose the requests that run first, so that the plan knows output lengths; `num_requests` 0 where none must."""
    from blendserve.planner.sample import write_sample_plan

    folder, record = _open(root)
    if (folder.sample / "plan.json").is_file():
        chosen = read_manifest(folder.sample / "plan.json", PlanManifest)
        return {"num_requests": sum(shard.num_requests for shard in chosen.shards)}
    with writing_to(folder.root):
        return {"num_requests": write_sample_plan(folder, record.spec, Path(record.model_folder))}


def run_sample(
    root: Path,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Choose and run the sample. Its completions are part of the result; what its limit cuts off goes on in a shard."""
    folder, _ = _open(root)
    _drop_preview(folder)
    if (folder.plan / "plan.json").is_file():
        return {"num_requests": 0, "is_skipped": True}
    chosen = choose_sample(root)
    if chosen["num_requests"]:
        with step(folder, "sample"):
            run_shard(folder.sample, 0, on_progress=on_progress, should_stop=should_stop)
    return chosen


def plan(root: Path, *, is_preview: bool = False) -> PlanManifest:
    """Estimate output lengths and costs, order the requests, cut the order into shards: `plan/`.

    A preview is planned before any request ran; a later `run_sample` drops it unless shards of it have run.
    """
    from blendserve.planner.plan import make_plan

    folder, record = _open(root)
    if (folder.plan / "plan.json").is_file():
        return read_manifest(folder.plan / "plan.json", PlanManifest)
    with step(folder, "plan"):
        if is_preview:  # first, so that a crash leaves no preview that passes for a plan that knows the sample
            folder.plan.mkdir(exist_ok=True)
            (folder.plan / _PREVIEW).touch()
        return make_plan(folder, record.spec, Path(record.model_folder))


def run_shard(
    plan_dir: Path,
    shard: int,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    completions: str | None = None,
) -> ShardManifest:
    """Run one shard in a process of its own: `completions/shard-*/`, or below the URL `completions`. Once only."""
    plan_dir = find_plan(plan_dir)
    return run_shard_process(plan_dir, shard, on_progress=on_progress, should_stop=should_stop, completions=completions)


def merge(root: Path, lease: Lease, *, allow_missing: bool = False) -> dict[str, Any]:
    """Put completions and input rows together: `results/` and `manifest.json`, under the lease on the job.

    Raises ReconciliationError when rows have no completion, unless `allow_missing`: then they come out as failed rows
    and the manifest says `incomplete`, so that a later run can finish them. Raises InUseError when another process
    took over the job. Returns the counts.
    """
    folder, record = _open(root)
    if is_finished(folder):
        return {**read_final_manifest(folder)["counts"], "path": str(folder.results)}
    with step(folder, "merge"):
        folder.success.unlink(missing_ok=True)  # where the results were removed since
        merged = merge_results(folder, allow_missing=allow_missing, check_lease=lease.check)
    write_manifest(
        folder.manifest,
        {
            "status": "incomplete" if merged.counts["missing"] else "done",
            "counts": merged.counts,
            "tokens": merged.tokens,
            "fingerprint": record.fingerprint,
            "identity": record.identity,
            "spec": record.spec.model_dump(mode="json"),
            "model_folder": record.model_folder,
            "plan": read_manifest(folder.plan / "plan.json", PlanManifest).summary,
            "timings_seconds": timings(folder),
            "versions": versions(),
            "results": [str(path.relative_to(folder.root)) for path in sorted(folder.results.glob("*.parquet"))],
        },
    )
    return {**merged.counts, "path": str(folder.results)}


def report(root: Path) -> Path:
    """Draw the job's HTML page from its manifests and metrics: `report.html`."""
    from blendserve.report.page import write_report

    folder, _ = _open(root)
    with step(folder, "report"):
        write_report(folder)
    return folder.report


def finish(root: Path) -> dict[str, Any]:
    """Declare the job done: `_SUCCESS`, last of all. Raises ReconciliationError when rows are still missing.

    Its output lengths are remembered beside the output folder, for the next run of the same job with other rows.
    """
    from blendserve.planner.length_history import remember

    folder, _ = _open(root)
    manifest = read_final_manifest(folder)
    if manifest["status"] != "done":
        raise ReconciliationError(
            f"{manifest['counts']['missing']} request(s) of {folder.root} have no completion: a shard did not finish. "
            "Run the job again to go on; finished rows are kept."
        )
    if not folder.success.is_file():
        remember(folder)
    with writing_to(folder.root), replacing(folder.success) as temporary:
        temporary.write_text(manifest["fingerprint"] + "\n", encoding="utf-8")
    return manifest


@contextmanager
def _held(spec: JobSpec) -> Iterator[tuple[ExaminedJob, Lease]]:
    """The examined job, whose folder is ours alone: a URL's from before its files are fetched until they are back."""
    with ExitStack() as held:
        if is_url(spec.output):
            lease = held.enter_context(holding(spec.output))
            examined = examine(spec, held.enter_context(working_copy(spec.output)))
        else:
            examined = examine(spec)
            lease = held.enter_context(holding(examined.folder.root))
        yield examined, lease


def _compare(root: Path) -> dict[str, Any]:
    from blendserve.planner.policy_comparison import compare_policies

    folder, record = _open(root)
    return compare_policies(folder, record.spec, Path(record.model_folder))


def _extract(examined: ExaminedJob, begun_by: str | None = None) -> dict[str, Any]:
    folder = examined.folder
    claim(folder, examined.record.model_copy(update={"begun_by": begun_by}))
    with step(folder, "extract", "input_rows", "requests") as is_done:
        if not is_done:
            extract_requests(examined.record.spec, examined.files, folder)
    return {"root": str(folder.root), "num_rows": _num_rows(folder, "requests")}


def _drop_preview(folder: JobFolder) -> None:
    """Make way for a plan that knows the sample, unless shards of the preview have run."""
    preview_mark = folder.plan / _PREVIEW
    if preview_mark.is_file() and not folder.completions.is_dir():
        (folder.plan / "plan.json").unlink(missing_ok=True)
        preview_mark.unlink()


def _open(root: Path) -> tuple[JobFolder, JobRecord]:
    folder = JobFolder(root.absolute())
    return folder, read_record(folder)


def _num_rows(folder: JobFolder, relation: str) -> int:
    return int(pq.read_metadata(folder.relation(relation)).num_rows)
