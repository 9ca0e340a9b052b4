"""A real Airflow with SQLite, over REST as programs use it and in a browser as people do.

The browser test needs Playwright and Debian's chromium (`install_browser.sh`); its screenshots are in out/screenshots.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.dags.airflow_server import AirflowServer

SCREENSHOTS = Path(__file__).resolve().parents[2] / "out" / "screenshots"
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


@pytest.fixture(scope="module")
def finished_run(server: AirflowServer) -> dict[str, Any]:
    """A run of the batch DAG over three rows, one of them without a prompt."""
    answer = server.trigger(input="requests.parquet", output="out/{run_id}", max_tokens=3, ignore_eos=True)
    assert answer.status_code == 200, answer.text
    run_url = f"/api/v2/dags/blendserve_batch/dagRuns/{answer.json()['dag_run_id']}"
    run: dict[str, Any] = {}

    def has_ended() -> bool:
        run.update(server.client.get(run_url).json())
        return run["state"] in ("success", "failed")

    server.wait_until(has_ended, 200)
    return run


def test_run_triggered_over_rest_answers_every_row(server: AirflowServer, finished_run: dict[str, Any]) -> None:
    assert finished_run["state"] == "success"
    (job,) = (server.workspace / "out").iterdir()
    results = pq.read_table(job / "results").to_pylist()
    assert [(row["request_id"], row["finish_reason"]) for row in results] == [
        ("one", "length"),
        ("two", "length"),
        ("three", "rejected"),
    ]


def test_shards_have_readable_names(server: AirflowServer, finished_run: dict[str, Any]) -> None:
    run_url = f"/api/v2/dags/blendserve_batch/dagRuns/{finished_run['dag_run_id']}"
    tasks = server.client.get(f"{run_url}/taskInstances").json()["task_instances"]
    (name,) = [task["rendered_map_index"] for task in tasks if task["task_id"] == "batch.run_shard"]
    assert name.startswith("shard 0 · density ")


def test_results_asset_triggers_the_consumer(server: AirflowServer, finished_run: dict[str, Any]) -> None:
    (job,) = (server.workspace / "out").iterdir()
    consumer_runs = "/api/v2/dags/blendserve_consumer_example/dagRuns"

    def has_consumed() -> bool:
        states = [run["state"] for run in server.client.get(consumer_runs).json()["dag_runs"]]
        return bool(states) and set(states) == {"success"}

    server.wait_until(has_consumed, 60)
    events = server.client.get("/api/v2/assets/events").json()["asset_events"]
    assert {"rows": 3, "failed": 1, "path": str(job / "results")} in [event["extra"] for event in events]


def test_report_tab_shows_the_report_to_those_signed_in_only(
    server: AirflowServer, finished_run: dict[str, Any]
) -> None:
    views = [
        view for plugin in server.client.get("/api/v2/plugins").json()["plugins"] for view in plugin["external_views"]
    ]
    (view,) = [view for view in views if view["url_route"] == "blendserve_report"]
    assert view["destination"] == "dag_run"
    path = view["href"].format(DAG_ID="blendserve_batch", RUN_ID=quote(finished_run["dag_run_id"], safe=""))

    page = server.client.get(path)
    assert page.status_code == 200
    (job,) = (server.workspace / "out").iterdir()
    assert page.text == (job / "report.html").read_text(encoding="utf-8")
    assert "sandbox allow-scripts;" in page.headers["content-security-policy"]
    assert httpx.get(server.address + path).status_code == 401
    assert httpx.get(server.address + path, headers={"Authorization": "Bearer forged"}).status_code == 403
    assert "no BlendServe job" in server.client.get("/blendserve/dags/blendserve_batch/report?run_id=unknown").text


@pytest.mark.parametrize(
    ("field", "value"), [("max_tokens", 0), ("policy", "best"), ("temperature", "hot"), ("stop", "text")]
)
def test_bad_param_is_refused_with_the_name_of_the_field(server: AirflowServer, field: str, value: Any) -> None:
    answer = server.trigger(**{field: value})
    assert answer.status_code == 400
    assert f"Invalid input for param {field}" in answer.json()["detail"]


def test_shard_marked_failed_stops_at_once_and_goes_on_when_cleared(server: AirflowServer) -> None:
    rows = {"request_id": [f"row-{number}" for number in range(30)], "prompt": [f"number {n}" for n in range(30)]}
    pq.write_table(pa.table(rows), server.workspace / "many.parquet")
    params = {"input": "many.parquet", "output": "many", "max_tokens": 200, "ignore_eos": True, "max_num_seqs": 2}
    run_url = f"/api/v2/dags/blendserve_batch/dagRuns/{server.trigger(**params).json()['dag_run_id']}"
    job = server.workspace / "many"
    server.wait_until(lambda: is_progressing(server, run_url), 150)
    assert engines_of(job)

    shard_url = f"{run_url}/taskInstances/batch.run_shard/0"
    assert server.client.patch(shard_url, json={"new_state": "failed"}).status_code == 200
    server.wait_until(lambda: not engines_of(job), 10)
    assert not (job / "completions" / "shard-00000" / "shard.json").exists(), "it was stopped in mid-shard"
    server.wait_until(lambda: server.client.get(run_url).json()["state"] == "failed", 60)
    assert (job / "results").is_dir(), "merge ran: what is finished can be used"
    num_kept = num_completions(job)

    cleared = server.client.post(
        "/api/v2/dags/blendserve_batch/clearTaskInstances",
        json={"dry_run": False, "dag_run_id": run_url.rsplit("/", 1)[1], "only_failed": True},
    )
    assert cleared.status_code == 200, cleared.text
    server.wait_until(lambda: server.client.get(run_url).json()["state"] == "success", 200)
    results = pq.read_table(job / "results")
    assert results["num_completion_tokens"].to_pylist() == [200] * 30
    shard = httpx.Response(200, content=(job / "completions" / "shard-00000" / "shard.json").read_bytes()).json()
    assert shard["num_resumed"] == num_kept, "no finished request ran again"


@pytest.fixture
def page(server: AirflowServer) -> Iterator[Any]:
    """A page of a signed-in browser."""
    sync_api: Any = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed; tests/dags/install_browser.sh brings it")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(60_000)
        page.goto(server.address)
        page.fill("input[name=username]", "ann")
        page.fill("input[name=password]", server.password)
        page.get_by_role("button", name="Sign in").click()
        page.get_by_role("link", name="Dags").first.wait_for()
        yield page
        browser.close()


def test_run_from_the_form_to_the_report(server: AirflowServer, page: Any) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.goto(f"{server.address}/dags/blendserve_batch")
    page.get_by_role("button", name="Trigger").first.click()
    form = page.get_by_role("dialog")
    page.fill("[name=element_input]", "requests.parquet")
    page.fill("[name=element_output]", "browser")
    page.fill("[name=element_max_tokens]", "4")
    page.screenshot(path=SCREENSHOTS / "form.png")
    form.get_by_text("Sampling", exact=True).click()
    page.fill("[name=element_seed]", "7")
    page.locator("#element_stop").scroll_into_view_if_needed()
    page.screenshot(path=SCREENSHOTS / "form_sampling.png")
    form.get_by_role("button", name="Trigger", exact=True).click()
    page.wait_for_url("**/dags/blendserve_batch/runs/**")

    run_url = f"/api/v2/dags/blendserve_batch/dagRuns/{page.url.rsplit('/', 1)[1]}"
    server.wait_until(lambda: server.client.get(run_url).json()["state"] in ("success", "failed"), 200)
    run = server.client.get(run_url).json()
    assert run["state"] == "success"
    assert (run["conf"]["seed"], run["conf"]["stop"], run["triggering_user_name"]) == (7, [], "ann")
    assert pq.read_table(server.workspace / "browser" / "results").num_rows == 3

    page.reload()
    page.get_by_text("Success").first.wait_for()
    page.screenshot(path=SCREENSHOTS / "run.png")
    page.get_by_text("BlendServe report").click()
    report = page.frame_locator("iframe")
    report.get_by_text("3 input rows").wait_for()
    assert report.locator("body").evaluate("() => self.origin") == "null", "the report is a foreign page to Airflow"
    page.screenshot(path=SCREENSHOTS / "report_tab.png")


def is_progressing(server: AirflowServer, run_url: str) -> bool:
    states = server.client.get(f"{run_url}/taskInstances/batch.run_shard/state-store?map_index=0").json()
    return bool(states.get("task_state_store"))


def engines_of(job: Path) -> list[str]:
    """The processes that run a shard of this job."""
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return [command.decode() for command in commands if b"run_shard" in command and str(job).encode() in command]


def num_completions(job: Path) -> int:
    return sum(pq.read_metadata(part).num_rows for part in job.glob("completions/**/part-*.parquet"))
