"""What a run's report tab shows when. What it asks Airflow for is seen in a real one: `test_cluster.py`."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest

from blendserve.airflow import report_tab
from blendserve.airflow.report_tab import report


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The jobs of the run, none at first."""
    jobs: dict[str, str] = {}
    monkeypatch.setattr(report_tab, "_jobs", lambda *_run: jobs)
    monkeypatch.setattr(report_tab, "_progress", lambda *_job: [])
    monkeypatch.setattr(report_tab, "_is_going_on", lambda *_job: False)
    return jobs


def add(jobs: dict[str, str], folder: Path, group: str) -> None:
    """A finished job, whose report says its group."""
    root = folder / group.rstrip(".")
    root.mkdir()
    (root / "job.json").write_text("{}")
    (root / "report.html").write_text(f"report of {group}")
    jobs[group] = str(root)


def shown(group: str | None = None) -> str:
    return bytes(report("dag", "manual__2026-11-23T06:00:00+00:00", group).body).decode()


def test_run_without_a_job_says_so(jobs: dict[str, str]) -> None:
    assert "has started no BlendServe job" in shown()


def test_report_of_an_attempt_before_is_not_shown_while_the_job_goes_on(
    jobs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(jobs, tmp_path, "batch.")
    assert shown() == "report of batch."
    monkeypatch.setattr(report_tab, "_is_going_on", lambda *_job: True)
    assert "No shard is running yet" in shown()


def test_job_that_failed_before_its_report_promises_none(jobs: dict[str, str], tmp_path: Path) -> None:
    jobs["batch."] = str(tmp_path)
    assert "ended before its report" in shown() and "No shard is running yet" not in shown()


def test_run_with_several_jobs_leads_to_the_report_of_each(jobs: dict[str, str], tmp_path: Path) -> None:
    for group in ("<first>.", "second."):
        add(jobs, tmp_path, group)
    page = shown()
    assert re.findall(">([^<>]+)</a>", page) == ["&lt;first&gt;", "second"]
    queries = [unescape(query) for query in re.findall('href="([^"]+)"', page)]
    assert queries[1] == "?run_id=manual__2026-11-23T06%3A00%3A00%2B00%3A00&group=second."
    assert shown("second.") == "report of second."
    assert shown("another") == page
