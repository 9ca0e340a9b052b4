"""A real Airflow with Celery workers: over REST as programs use it, in a browser as people do, and with workers that
are killed and paused. Debian's programs come from `install_programs.sh`; the browser's screenshots lie in
out/screenshots.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Page, sync_playwright

from blendserve.airflow.job_options import path_name
from blendserve.job_folder import JobFolder
from tests.dags.airflow_cluster import AirflowCluster
from tests.dags.conftest import skip_here

pytestmark = pytest.mark.timeout(900)  # a busy machine takes its time

NUM_ROWS = 40
NUM_TOKENS = 200

SCREENSHOTS = Path(__file__).resolve().parents[2] / "out" / "screenshots"
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def page(cluster: AirflowCluster) -> Iterator[Page | None]:
    """A page of a signed-in browser; None where there is no browser."""
    chromium = shutil.which("chromium")
    if chromium is None:
        yield None
        return
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(cluster.address)
        page.fill("input[name=username]", "ann")
        page.fill("input[name=password]", cluster.password)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("link", name="Dags").first.wait_for()
        yield page
        browser.close()


@pytest.fixture(scope="module")
def finished_run(cluster: AirflowCluster, page: Page | None) -> dict[str, Any]:
    """A run over three rows, one of them without a prompt; triggered from the form where there is a browser."""
    if page is None:
        params = {"output": "out/{run_id}", "max_tokens": 4, "ignore_eos": True}
        run_url = url_of(cluster.trigger(input="requests.parquet", **params))
    else:
        run_url = trigger_from_form(cluster, page)
    return cluster.wait_for_run(run_url, "success", "failed")


def trigger_from_form(cluster: AirflowCluster, page: Page) -> str:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.goto(f"{cluster.address}/dags/blendserve_batch")
    page.get_by_role("button", name="Trigger").first.click()
    form = page.get_by_role("dialog")
    page.fill("[name=element_input]", "requests.parquet")
    page.fill("[name=element_output]", "out/{run_id}")
    page.fill("[name=element_max_tokens]", "4")
    page.screenshot(path=SCREENSHOTS / "form.png")
    form.get_by_text("Sampling", exact=True).click()
    page.fill("[name=element_seed]", "7")
    page.locator("#element_stop").scroll_into_view_if_needed()
    page.screenshot(path=SCREENSHOTS / "form_sampling.png")
    form.get_by_role("button", name="Trigger", exact=True).click()
    page.wait_for_url("**/dags/blendserve_batch/runs/**")
    return f"/api/v2/dags/blendserve_batch/dagRuns/{page.url.rsplit('/', 1)[1]}"


def test_run_from_the_form_to_the_report(
    cluster: AirflowCluster, page: Page | None, finished_run: dict[str, Any]
) -> None:
    if page is None:
        skip_here("chromium is not installed; tests/dags/install_programs.sh brings it")
    run = finished_run
    assert run["state"] == "success"
    assert (run["conf"]["seed"], run["conf"]["stop"], run["triggering_user_name"]) == (7, [], "ann")

    page.reload()
    page.get_by_text("Success").first.wait_for()
    page.screenshot(path=SCREENSHOTS / "run.png")
    page.get_by_text("BlendServe report").click()
    report = page.frame_locator("iframe")
    report.get_by_text("3 input rows").wait_for()
    assert report.locator("body").evaluate("() => self.origin") == "null", "the report is a foreign page to Airflow"
    page.screenshot(path=SCREENSHOTS / "report_tab.png")


def test_run_answers_every_row(cluster: AirflowCluster, finished_run: dict[str, Any]) -> None:
    assert finished_run["state"] == "success"
    job = folder_of(cluster, finished_run)
    results = pq.read_table(job / "results").to_pylist()
    assert [row["request_id"] for row in results] == ["one", "two", "three"]
    assert [row["finish_reason"] == "rejected" for row in results] == [False, False, True]


def test_shards_have_readable_names_and_run_on_gpu_workers(
    cluster: AirflowCluster, finished_run: dict[str, Any]
) -> None:
    run_url = f"/api/v2/dags/blendserve_batch/dagRuns/{finished_run['dag_run_id']}"
    tasks = cluster.client.get(f"{run_url}/taskInstances").json()["task_instances"]
    (name,) = [task["rendered_map_index"] for task in tasks if task["task_id"] == "batch.run_shard"]
    assert name.startswith("shard 0 · density ")
    assert {task["task_id"] for task in tasks if task["queue"] == "gpu"} == {"batch.sample", "batch.run_shard"}


def test_results_asset_triggers_the_consumer(cluster: AirflowCluster, finished_run: dict[str, Any]) -> None:
    job = folder_of(cluster, finished_run)
    consumer_runs = "/api/v2/dags/blendserve_consumer_example/dagRuns"

    def has_consumed() -> bool:
        states = [run["state"] for run in cluster.client.get(consumer_runs).json()["dag_runs"]]
        return bool(states) and set(states) == {"success"}

    cluster.wait_until(has_consumed, 60)
    events = cluster.client.get("/api/v2/assets/events").json()["asset_events"]
    assert {"rows": 3, "failed": 1, "path": str(job / "results")} in [event["extra"] for event in events]


def test_report_tab_shows_the_report_to_those_signed_in_only(
    cluster: AirflowCluster, finished_run: dict[str, Any]
) -> None:
    views = [
        view for plugin in cluster.client.get("/api/v2/plugins").json()["plugins"] for view in plugin["external_views"]
    ]
    (view,) = [view for view in views if view["url_route"] == "blendserve_report"]
    assert view["destination"] == "dag_run"
    path = view["href"].format(DAG_ID="blendserve_batch", RUN_ID=quote(finished_run["dag_run_id"], safe=""))

    page = cluster.client.get(path)
    assert page.status_code == 200
    job = folder_of(cluster, finished_run)
    assert page.text == (job / "report.html").read_text(encoding="utf-8")
    assert "sandbox allow-scripts;" in page.headers["content-security-policy"]
    assert httpx.get(cluster.address + path).status_code == 401
    assert httpx.get(cluster.address + path, headers={"Authorization": "Bearer forged"}).status_code == 403
    assert "no BlendServe job" in cluster.client.get("/blendserve/dags/blendserve_batch/report?run_id=unknown").text


@pytest.mark.parametrize(
    ("field", "value"), [("max_tokens", 0), ("policy", "best"), ("temperature", "hot"), ("stop", "text")]
)
def test_bad_param_is_refused_with_the_name_of_the_field(cluster: AirflowCluster, field: str, value: Any) -> None:
    answer = cluster.trigger(**{field: value})
    assert answer.status_code == 400
    assert f"Invalid input for param {field}" in answer.json()["detail"]


def test_shard_marked_failed_stops_at_once_and_goes_on_when_cleared(cluster: AirflowCluster) -> None:
    run_url = start_long_run(cluster, "marked", NUM_ROWS)
    job = cluster.workspace / "marked"
    cluster.wait_until(lambda: has_parts(job, attempt=1), 150)
    assert engines_of(job)
    run_id = quote(run_url.rsplit("/", 1)[1], safe="")
    progress = cluster.client.get(f"/blendserve/dags/blendserve_batch/report?run_id={run_id}")
    assert "Density now" in progress.text and f"of {NUM_ROWS}" in progress.text

    shard_url = f"{run_url}/taskInstances/batch.run_shard/0"
    assert cluster.client.patch(shard_url, json={"new_state": "failed"}).status_code == 200
    cluster.wait_until(lambda: not engines_of(job), 10)
    assert not (job / "completions" / "shard-00000" / "shard.json").exists(), "it was stopped in mid-shard"
    cluster.wait_for_run(run_url, "failed")
    assert (job / "results").is_dir(), "merge ran: what is finished can be used"
    num_kept = num_completions(job)

    cleared = cluster.client.post(
        "/api/v2/dags/blendserve_batch/clearTaskInstances",
        json={"dry_run": False, "dag_run_id": run_url.rsplit("/", 1)[1], "only_failed": True},
    )
    assert cleared.status_code == 200, cleared.text
    cluster.wait_for_run(run_url, "success")
    assert pq.read_table(job / "results")["num_completion_tokens"].to_pylist() == [NUM_TOKENS] * NUM_ROWS
    shard = json.loads((job / "completions" / "shard-00000" / "shard.json").read_text())
    assert shard["num_resumed"] == num_kept, "no finished request ran again"


def test_killed_and_paused_workers_lose_and_double_nothing(cluster: AirflowCluster) -> None:
    """The first GPU worker is killed in mid-shard, the second one paused for longer than its lease; the third one takes
    over, and the second wakes up while it runs."""
    run_url = start_long_run(cluster, "lost", 2 * NUM_ROWS)
    job = cluster.workspace / "lost"
    cluster.wait_until(lambda: has_parts(job, attempt=1), 150)
    cluster.signal_worker("gpu", signal.SIGKILL)
    cluster.start_worker("gpu", "gpu-2")
    cluster.wait_until(lambda: has_parts(job, attempt=2), 200)
    cluster.signal_worker("gpu-2", signal.SIGSTOP)
    paused = [process for process in cluster.processes_of("gpu-2") if "run_shard" in " ".join(process.cmdline())]
    assert len(paused) == 1
    cluster.start_worker("gpu")
    cluster.wait_until(lambda: has_parts(job, attempt=3), 200)
    cluster.signal_worker("gpu-2", signal.SIGCONT)
    cluster.wait_for_run(run_url, "success")
    cluster.wait_until(lambda: not paused[0].is_running(), 30)
    cluster.signal_worker("gpu-2", signal.SIGKILL)

    results = pq.read_table(job / "results")
    assert results["request_id"].to_pylist() == [f"row-{number}" for number in range(2 * NUM_ROWS)]
    assert results["num_completion_tokens"].to_pylist() == [NUM_TOKENS] * 2 * NUM_ROWS
    counted = pa.concat_tables(pq.read_table(path) for path in JobFolder(job).completion_files())
    assert sorted(counted["row_index"].to_pylist()) == list(range(2 * NUM_ROWS))


def url_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return f"/api/v2/dags/blendserve_batch/dagRuns/{answer.json()['dag_run_id']}"


def folder_of(cluster: AirflowCluster, run: dict[str, Any]) -> Path:
    return cluster.workspace / "out" / path_name(run["dag_run_id"])


def start_long_run(cluster: AirflowCluster, output: str, num_rows: int) -> str:
    """A run of one shard that takes long enough to be interrupted; returns its URL."""
    numbers = range(num_rows)
    rows = {"request_id": [f"row-{number}" for number in numbers], "prompt": [f"number {n}" for n in numbers]}
    pq.write_table(pa.table(rows), cluster.workspace / f"{output}.parquet")
    params: dict[str, Any] = {
        "input": f"{output}.parquet",
        "output": output,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
    }
    return url_of(cluster.trigger(**params, max_num_seqs=2, shards=1, sample_fraction=0.0))


def has_parts(job: Path, attempt: int) -> bool:
    """Whether this attempt at the shard has finished some requests and isn't through."""
    folder = job / "completions" / "shard-00000"
    assert not (folder / "shard.json").exists(), "the shard is too short for this test"
    return any(folder.glob(f"part-{attempt:05d}-*"))


def engines_of(job: Path) -> list[str]:
    """The processes that run a shard of this job."""
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return [command.decode() for command in commands if b"run_shard" in command and str(job).encode() in command]


def num_completions(job: Path) -> int:
    return sum(pq.read_metadata(part).num_rows for part in JobFolder(job).completion_files())
