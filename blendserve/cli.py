"""The command line. Results go to stdout, progress and messages to stderr; with --json the last line is one object.

Exit status: 0 done, 1 finished with failed rows under --on-row-error fail, 2 bad usage or input, 3 internal error,
69 an object store doesn't answer, 75 in use by another process (try again later), 130 stopped on request.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import typer

from blendserve import demo_data, job
from blendserve.console import Console
from blendserve.doctor import examine
from blendserve.errors import BlendServeError, Interrupted, OutputError, UsageError
from blendserve.file_store import open_store
from blendserve.job_record import holding, writing_to
from blendserve.planner.simulate import POLICIES
from blendserve.planner.simulate import simulate as simulate_policies
from blendserve.planner.workload import generate_workload
from blendserve.spec import JobSpec, Policy, load_job
from blendserve.working_copy import is_url, working_copy

app = typer.Typer(
    name="blendserve",
    help="Offline LLM inference for data pipelines: Parquet in, Parquet out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_ROWS_FAILED = 1
_INTERNAL_ERROR = 3
_JOB_FILE = typer.Option("--job", help="YAML file with any of these options; options given here win.")
_JOB_FOLDER = typer.Argument(metavar="DIR", help="The job's output folder, or its URL.")
_JSON = typer.Option("--json", help="Print one JSON object as the last line of stdout.")

Body = Callable[..., tuple[dict[str, Any], int]]


def main() -> None:
    """Entry point of the `blendserve` command."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    app()


def _interrupt(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)  # once is enough: a second one would break off the clean stop
    raise Interrupted(
        f"Stopped by {signal.Signals(number).name}. What is finished is kept; run the same command again to go on."
    )


def _reporting(body: Body) -> Callable[..., None]:
    """Give a command `--json` and the exit statuses: `body` takes a Console and returns (result, exit status)."""

    @functools.wraps(body)
    def command(*, as_json: bool, **options: Any) -> None:
        console = Console(is_quiet=as_json)
        try:
            result, status = body(console, **options)
        except BlendServeError as error:
            console.error(str(error))
            result, status = {"status": "error", "error": str(error)}, error.exit_status
        except Exception as error:  # noqa: BLE001 - the last resort: report it and say that it's our fault
            console.error(traceback.format_exc())
            console.error("This is a bug in BlendServe, not in your job. Finished work is kept.")
            result, status = {"status": "error", "error": repr(error)}, _INTERNAL_ERROR
        if as_json:
            typer.echo(json.dumps({**result, "exit_status": status}, ensure_ascii=False))
        raise typer.Exit(status)

    own = list(inspect.signature(body, eval_str=True).parameters.values())[1:]
    flag = inspect.Parameter(
        "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, _JSON]
    )
    _set_signature(command, [*own, flag])
    return command


def _taking_a_job(body: Callable[[Console, JobSpec], tuple[dict[str, Any], int]]) -> Body:
    """Give a command one option for each field of JobSpec, and `--job`; `body` gets the JobSpec that they make."""

    @functools.wraps(body)
    def command(console: Console, job_file: Path | None, **options: Any) -> tuple[dict[str, Any], int]:
        stated = {name: value for name, value in options.items() if value is not None and value != []}
        return body(console, load_job(job_file, stated))

    kind = inspect.Parameter.KEYWORD_ONLY
    file = inspect.Parameter("job_file", kind, default=None, annotation=Annotated[Path | None, _JOB_FILE])
    own_first = sorted(JobSpec.model_fields, key=lambda name: name not in JobSpec.__annotations__)
    fields = [inspect.Parameter(name, kind, default=None, annotation=_option_of(name)) for name in own_first]
    console = inspect.Parameter("console", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Console)
    _set_signature(command, [console, file, *fields])
    return command


def _option_of(name: str) -> Any:
    field = JobSpec.model_fields[name]
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not type(None)]
    default = "" if field.is_required() or field.default in (None, (), False) else f" Default: {field.default}."
    help_text = f"{field.description}{default}"
    option = f"--{name.replace('_', '-')}"
    if get_origin(field.annotation) is tuple:
        return Annotated[list[str] | None, typer.Option(option, help=help_text)]
    if kinds == [bool]:
        return Annotated[bool | None, typer.Option(f"{option}/--no-{option[2:]}", help=help_text)]
    kind = kinds[0] if kinds[0] in (int, float) else str
    metavar = None if isinstance(kinds[0], type) else "|".join(map(str, kinds))
    return Annotated[kind | None, typer.Option(option, help=help_text, metavar=metavar)]


def _set_signature(function: Callable[..., Any], parameters: list[inspect.Parameter]) -> None:
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def _place(output: str) -> str:
    """What to call the job's folder, from wherever it is asked for."""
    return output.rstrip("/") if is_url(output) else str(Path(output).absolute())


@app.command()
@_reporting
@_taking_a_job
def run(console: Console, spec: JobSpec) -> tuple[dict[str, Any], int]:
    """Run a job from Parquet to Parquet, or go on with one that was stopped."""
    with console.progress() as on_progress:
        manifest = job.run(spec, on_step=console.step, on_progress=on_progress)
    console.finished(manifest, _place(spec.output))
    counts = manifest["counts"]
    has_failed_rows = counts["failed"] + counts["rejected"] > 0
    return manifest, _ROWS_FAILED if has_failed_rows and spec.on_row_error == "fail" else 0


@app.command()
@_reporting
@_taking_a_job
def plan(console: Console, spec: JobSpec) -> tuple[dict[str, Any], int]:
    """Order a job and predict its time, without running anything: no GPU is needed."""
    made, compared = job.preview(spec, on_step=console.step)
    console.simulation(compared)
    plan_dir = f"{_place(spec.output)}/plan"
    return {**made.model_dump(mode="json"), "plan_dir": plan_dir, "simulated": compared}, 0


@app.command("run-shard")
@_reporting
def run_shard(
    console: Console,
    plan_dir: Annotated[str, typer.Argument(help="The plan's folder, or the output folder that holds it.")],
    shard: Annotated[int, typer.Argument(help="Which shard, from 0.")],
) -> tuple[dict[str, Any], int]:
    """Run one shard of a plan; a finished shard is not run again."""
    if is_url(plan_dir):
        raise UsageError(
            f"run-shard works in a local folder, got {plan_dir}. Shards of a job on an object store are run by "
            "`blendserve run` or by Airflow."
        )
    with console.progress() as on_progress:
        done = job.run_shard(Path(plan_dir), shard, on_progress=on_progress)
    console.step("run_shard", done.model_dump(mode="json"))
    return done.model_dump(mode="json"), 0


@app.command()
@_reporting
def merge(console: Console, output: Annotated[str, _JOB_FOLDER]) -> tuple[dict[str, Any], int]:
    """Put the completions of all shards and the input rows together: results, manifest, report, _SUCCESS."""
    if open_store(output).read("job.json") is None:
        raise OutputError(f"{output} holds no job: job.json is not there. Give the output of a job.")
    with holding(output) as lease, working_copy(output) as root:
        console.step("merge", job.merge(root, lease) | {"path": f"{_place(output)}/results"})
        job.report(root)
        manifest = job.finish(root)
    console.finished(manifest, _place(output))
    return manifest, 0


@app.command()
@_reporting
def report(console: Console, output: Annotated[str, _JOB_FOLDER]) -> tuple[dict[str, Any], int]:
    """Draw the HTML report of a job again."""
    with working_copy(output) as root:
        path = f"{_place(output)}/{job.report(root).name}"
    console.say(path)
    return {"report": path}, 0


@app.command()
@_reporting
def show(
    console: Console,
    output: Annotated[str, _JOB_FOLDER],
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many result rows.")] = 6,
) -> tuple[dict[str, Any], int]:
    """Show a finished job: some rows of the result, the plan beside what really happened, where the report is."""
    with working_copy(output, ("results/*",)) as root:
        finished = job.show(root, rows)
    console.results(finished["rows"])
    console.step("plan", finished["manifest"]["plan"] | {"real_seconds": finished["real_seconds"]})
    console.finished(finished["manifest"], _place(output))
    return finished, 0


@app.command()
@_reporting
def simulate(
    console: Console,
    input_: Annotated[Path, typer.Option("--input", help="Parquet: prompt_token_ids or input_tokens, output_tokens.")],
    model: Annotated[str, typer.Option("--model", help="A built-in model shape or a folder with config.json.")],
    hardware: Annotated[str, typer.Option("--hardware", help="As a job's: h100, 4xh100, a profile's JSON file.")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Devices that run shards side by side.")] = 1,
    policies: Annotated[str, typer.Option("--policies", help="Comma-separated.")] = ",".join(POLICIES),
    lengths: Annotated[Literal["known", "sampled"], typer.Option("--lengths", help="What the plan knows.")] = "known",
    overlap: Annotated[Literal["on", "off"], typer.Option("--overlap", help="Compute beside memory, or after.")] = "on",
) -> tuple[dict[str, Any], int]:
    """Replay a workload step by step under a cost model, for each policy: no GPU is needed."""
    chosen = tuple(policy.strip() for policy in policies.split(","))
    unknown = [policy for policy in chosen if policy not in POLICIES]
    if unknown:
        raise UsageError(f"Unknown policies: {', '.join(unknown)}. Expected some of {', '.join(POLICIES)}.")
    found = simulate_policies(
        input_,
        model=model,
        hardware=hardware,
        gpus=gpus,
        policies=cast("tuple[Policy, ...]", chosen),
        lengths=lengths,
        is_overlapped=overlap == "on",
    )
    console.simulation(found)
    return found, 0


@app.command()
@_reporting
def workload(
    console: Console,
    density: Annotated[float, typer.Option("--density", help="Compute time over memory time, of the whole.")],
    sharing: Annotated[float, typer.Option("--sharing", help="Share of the prompt tokens that can be shared.")],
    requests: Annotated[int, typer.Option("--requests", help="Number of requests.")],
    model: Annotated[str, typer.Option("--model", help="A built-in model shape or a folder with config.json.")],
    hardware: Annotated[str, typer.Option("--hardware", help="As a job's: h100, 4xh100, a profile's JSON file.")],
    output: Annotated[Path, typer.Option("--output", help="Parquet file to write.")],
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same workload.")] = 0,
) -> tuple[dict[str, Any], int]:
    """Write a workload of given density and sharing, drawn from the lengths of real traces."""
    with writing_to(output.absolute().parent):
        made = generate_workload(
            output,
            density=density,
            sharing=sharing,
            num_requests=requests,
            model=model,
            hardware=hardware,
            seed=seed,
        )
    console.say(json.dumps(made, indent=2))
    return made, 0


@app.command("demo-data")
@_reporting
def make_demo_data(
    console: Console,
    output: Annotated[Path, typer.Option("--output", help="Parquet file to write.")],
    rows: Annotated[int, typer.Option("--rows", min=3, help="Number of rows.")] = demo_data.DEFAULT_ROWS,
) -> tuple[dict[str, Any], int]:
    """Write rows of three kinds with different needs, to try a job on."""
    with writing_to(output.absolute().parent):
        counts = demo_data.write(output, rows)
    console.say(f"{output}: " + ", ".join(f"{count} {kind}" for kind, count in counts.items()))
    return {"path": str(output), "rows_by_kind": counts}, 0


@app.command()
@_reporting
def doctor(console: Console) -> tuple[dict[str, Any], int]:
    """Check what this machine can run and name what is missing."""
    findings = examine()
    console.findings(findings)
    is_fit = all(finding.is_fine or not finding.is_required for finding in findings)
    return {"findings": [finding.as_dict() for finding in findings], "is_fit": is_fit}, 0 if is_fit else 2
