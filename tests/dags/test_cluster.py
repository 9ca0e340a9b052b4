"""A real Airflow with Celery workers: over REST as programs use it, in a browser as people do, and with workers that
are killed and paused. Debian's programs come from `install_programs.sh`; the browser's screenshots lie in
out/screenshots.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Page, sync_playwright

from blendserve.airflow.job_options import path_name
from tests.dags.airflow_cluster import AirflowCluster
from tests.dags.conftest import skip_here
from tests.dags.long_runs import LongRun, url_of

pytestmark = pytest.mark.timeout(900)  # a busy machine takes its time

NUM_ROWS = 130
NUM_KILLS = 3

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
        page.goto("about:blank")  # an open page asks Airflow, and draws, all the time
    return cluster.wait_for_run(run_url, "success", "failed")


def trigger_from_form(cluster: AirflowCluster, page: Page) -> str:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.goto(f"{cluster.address}/dags/blendserve_batch")
    page.get_by_role("button", name="Trigger").first.click()
    form = page.get_by_role("dialog")
    page.fill("[name=element_input]", "requests.parquet")
    page.fill("[name=element_output]", "out/{run_id}")
    page.fill("[name=element_max_tokens]", "4")
    form.locator("code", has_text="{run_id}").wait_for()  # the help is Markdown
    page.screenshot(path=SCREENSHOTS / "form.png")
    form.get_by_text("Sampling", exact=True).click()
    page.fill("[name=element_seed]", "7")
    page.locator("#element_stop").scroll_into_view_if_needed()
    page.screenshot(path=SCREENSHOTS / "form_sampling.png")
    form.get_by_text("Planning", exact=True).click()
    form.locator("#element_policy").click()
    page.get_by_text("Depth first: share prefixes only").click()
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
    conf = run["conf"]
    assert (conf["seed"], conf["stop"], conf["policy"], run["triggering_user_name"]) == (7, [], "dfs", "ann")

    page.goto(f"{cluster.address}/dags/blendserve_batch/runs/{quote(run['dag_run_id'], safe='')}")
    page.get_by_text("Success").first.wait_for()
    page.screenshot(path=SCREENSHOTS / "run.png")
    page.get_by_text("BlendServe report").click()
    report = page.frame_locator("iframe")
    report.get_by_text("3 input rows").wait_for()
    assert report.locator("body").evaluate("() => self.origin") == "null", "the report is a foreign page to Airflow"
    page.screenshot(path=SCREENSHOTS / "report_tab.png")
    page.close()


def test_run_answers_every_row(cluster: AirflowCluster, finished_run: dict[str, Any]) -> None:
    assert finished_run["state"] == "success"
    job = folder_of(cluster, finished_run)
    results = pq.read_table(job / "results").to_pylist()
    assert [row["request_id"] for row in results] == ["one", "two", "three"]
    assert [row["finish_reason"] == "rejected" for row in results] == [False, False, True]


def test_no_log_holds_a_prompt(cluster: AirflowCluster, finished_run: dict[str, Any]) -> None:
    logs = [path.read_text(encoding="utf-8") for path in cluster.workspace.rglob("*.log")]
    assert any(finished_run["dag_run_id"] in log for log in logs)
    assert not any("tell nobody" in log for log in logs)


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


def test_data_that_arrives_starts_a_run_whose_tab_shows_what_the_job_would_cost(cluster: AirflowCluster) -> None:
    """A scheduled run takes the form's defaults."""
    (asset,) = cluster.client.get("/api/v2/assets", params={"name_pattern": "requests_landed"}).json()["assets"]
    landed = cluster.client.post("/api/v2/assets/events", json={"asset_id": asset["id"]})
    assert landed.status_code == 200, landed.text
    runs_url = "/api/v2/dags/preview_on_arrival/dagRuns"
    cluster.wait_until(lambda: bool(cluster.client.get(runs_url).json()["dag_runs"]), 60)
    (run,) = cluster.client.get(runs_url).json()["dag_runs"]
    assert run["run_type"] == "asset_triggered"
    waited = cluster.client.get(f"{runs_url}/{run['dag_run_id']}/wait", params={"interval": 1}, timeout=240)
    assert json.loads(waited.text.splitlines()[-1])["state"] == "success"
    report = f"/blendserve/dags/preview_on_arrival/report?run_id={quote(run['dag_run_id'], safe='')}"
    assert "The plan in words" in cluster.client.get(report).text


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


@pytest.fixture(scope="module")
def long_run(cluster: AirflowCluster) -> LongRun:
    """A run in mid-shard; what is left of it is enough for the tests below, which leave it in mid-shard."""
    return LongRun(cluster, "interrupted", NUM_ROWS)


def test_what_airflow_cannot_check_fails_preflight_with_the_name_of_the_field(
    cluster: AirflowCluster,
) -> None:
    run_url = url_of(cluster.trigger("blendserve_plan_only", input="/etc/passwd"))
    cluster.wait_for_run(run_url, "failed")
    preflight = cluster.client.get(f"{run_url}/taskInstances/preview.preflight").json()
    assert (preflight["state"], preflight["try_number"]) == ("failed", 1), "another attempt would fail as well"
    log = cluster.client.get(f"{run_url}/taskInstances/preview.preflight/logs/1").text
    assert "Option 'input'" in log and "allowed_paths" in log


def test_shard_marked_failed_stops_at_once_and_goes_on_when_cleared(cluster: AirflowCluster, long_run: LongRun) -> None:
    tab = f"/blendserve/dags/patient_batch/report?run_id={quote(long_run.run_id, safe='')}"
    long_run.wait_for_progress()
    progress = cluster.client.get(tab)
    assert "Density now" in progress.text and f"of {NUM_ROWS}" in progress.text
    store = cluster.client.get(f"{long_run.url}/taskInstances/batch.run_shard/state-store", params={"map_index": 0})
    assert "tokens_per_second" in store.text
    assert long_run.engines()

    shard_url = f"{long_run.url}/taskInstances/batch.run_shard/0"
    assert cluster.client.patch(shard_url, json={"new_state": "failed"}).status_code == 200
    cluster.wait_until(lambda: not long_run.engines(), 10)
    long_run.note_interruption()
    cluster.wait_for_run(long_run.url, "failed")
    assert (long_run.job / "results").is_dir(), "merge ran: what is finished can be used"
    assert "incomplete" in cluster.client.get(tab).text
    num_kept = long_run.num_completions()

    cleared = cluster.client.post(
        "/api/v2/dags/patient_batch/clearTaskInstances",
        json={"dry_run": False, "dag_run_id": long_run.run_id, "only_failed": True},
    )
    assert cleared.status_code == 200, cleared.text
    long_run.wait_for_progress()
    assert long_run.num_completions() > num_kept > 0
    assert "Density now" in cluster.client.get(tab).text, "not the report of the attempt before"


def test_killed_workers_lose_nothing_and_nothing_runs_twice(long_run: LongRun) -> None:
    """More kills in a row: `soak_worker_kills.py`."""
    drawn = random.Random()
    kept = [long_run.kill_in_mid_shard(drawn) for _ in range(NUM_KILLS)]
    assert kept == sorted(set(kept)), "each attempt got further than the one before"
    written = long_run.written_rows()
    assert len(written) == len(set(written)) == kept[-1]


def test_paused_worker_that_wakes_up_after_its_lease_doubles_nothing(
    cluster: AirflowCluster, long_run: LongRun
) -> None:
    """Another worker takes over meanwhile, and the paused one wakes up while that one runs."""
    long_run.wait_for_progress()
    cluster.signal_worker("gpu", signal.SIGSTOP)
    (paused,) = long_run.engines()
    assert paused.num_fds() < 20, "however many files the attempts before it wrote"
    long_run.note_interruption()
    cluster.start_worker("gpu", "gpu-2")
    long_run.wait_for_progress()
    cluster.signal_worker("gpu", signal.SIGCONT)
    cluster.wait_for_run(long_run.url, "success")
    cluster.wait_until(lambda: not paused.is_running(), 30)
    long_run.check_that_every_row_came_out_once()


def folder_of(cluster: AirflowCluster, run: dict[str, Any]) -> Path:
    return cluster.workspace / "out" / path_name(run["dag_run_id"])
