"""The page as a whole: what it shows, what it must not show, and what it does when parts of the job are missing."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blendserve import schemas
from blendserve.errors import OutputError
from blendserve.job_folder import JobFolder
from blendserve.manifest import PlanManifest, read_manifest, write_manifest
from blendserve.report.page import write_report

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
FIGURES = ("tree", "density", "predicted-usage", "seconds", "lengths", "cached", "usage")


class PageReader(HTMLParser):
    """Checks that elements are balanced; collects the visible text, what elements load, and the figures' data."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.policies: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.loads += [values[name] or "" for name in ("src", "srcset", "data", "poster") if name in values]
        if tag in ("link", "a", "base") and not (values.get("href") or "").startswith("#"):
            self.loads.append(values.get("href") or "")
        if (values.get("http-equiv") or "").lower() == "content-security-policy":
            self.policies.append(values.get("content") or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def figures(self) -> list[str]:
        return [name.removeprefix("data-") for name in self.ids if name.startswith("data-")]


def read_page(folder: JobFolder) -> PageReader:
    write_report(folder)
    reader = PageReader()
    reader.feed(folder.report.read_text(encoding="utf-8"))
    reader.close()
    assert reader.open == []
    assert len(reader.ids) == len(set(reader.ids))
    return reader


def test_shows_every_section_and_the_numbers_of_the_job(job) -> None:
    page = read_page(job.write())
    assert page.figures == list(FIGURES)
    assert "46 input rows = 39 succeeded + 1 failed + 3 rejected + 3 duplicates resolved + 0 missing" in page.text
    assert "do not add up" not in page.text
    for number in ("123,456", "45,678", "7,890", "f1e2d3c4" * 8, "duckdb 2.0.0"):
        assert number in page.text
    assert "tokens/s of engine time 338" in page.text  # (40 * 100 + 40 * 10) / (4 + 4 + 5) seconds
    assert "40.0 % of the prompt tokens repeat" in page.text
    assert "the plan keeps 39.6 %, which is 99.0 % of what is possible" in page.text
    assert "density 3.73 on the left and 0.096 on the right" in page.text
    assert "It should take 61 s (the bound, with perfect sharing and overlap, is 52.5 s) and took 9 s" in page.text
    assert "estimates are rough" in page.text
    assert "rejected the prompt is empty 2 rejected the prompt is null 1" in page.text
    assert "run_shard 9 s" in page.text


def test_loads_nothing_from_anywhere(job) -> None:
    page = read_page(job.write())
    assert page.loads == []
    (policy,) = page.policies
    assert "default-src 'none'" in policy
    assert "http" not in policy
    html = job.folder.report.read_text(encoding="utf-8")
    assert html.count("plotly.js v") == 1
    own_text = html.replace(max(re.findall(r"<script>.*?</script>", html, re.DOTALL), key=len), "")
    assert "http:" not in own_text
    assert "https:" not in own_text
    assert "url(" not in own_text
    assert "@import" not in own_text


def test_shows_no_prompt_no_completion_no_credentials(job) -> None:
    job.spec = {"system": "Secret system prompt", "template": "Secret template {{ body }}"}
    read_page(job.write())
    html = job.folder.report.read_text(encoding="utf-8")
    assert "Secret" not in html
    assert "password" not in html
    assert "s3://bucket/in.parquet" in html


def test_escapes_what_comes_from_the_job(job, tmp_path: Path) -> None:
    job.root = tmp_path / "<script>alert(0)</script>"
    job.rejections = ("bad <img src=x onerror=alert(2)> tag",)
    page = read_page(job.write())
    html = job.folder.report.read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "<img" not in html
    assert "<b>bold" not in html
    assert "bad <img src=x onerror=alert(N)> tag" in page.text


def test_a_job_that_has_only_begun(job) -> None:
    job.write_record()
    page = read_page(job.folder)
    assert page.figures == []
    for text in ("not merged yet", "not been analyzed yet", "not been planned yet", "No shard has left step metrics"):
        assert text in page.text


def test_a_job_whose_rows_were_all_rejected(job) -> None:
    job.num_requests = job.num_sampled = job.num_failed = job.num_duplicates = job.num_shards = 0
    page = read_page(job.write())
    assert page.figures == []
    assert "3 input rows = 0 succeeded + 0 failed + 3 rejected" in page.text
    assert "No row became a request" in page.text
    assert "No request was left to plan" in page.text


def test_a_job_of_no_rows(job) -> None:
    job.num_requests = job.num_sampled = job.num_failed = job.num_duplicates = job.num_shards = 0
    job.rejections = ()
    page = read_page(job.write())
    assert "0 input rows" in page.text
    assert "None: every row has its completion" in page.text


def test_a_plan_whose_requests_were_all_in_the_sample(job) -> None:
    job.num_shards, job.num_sampled = 0, job.num_requests
    page = read_page(job.write())
    assert page.figures == ["tree", "seconds", "cached", "usage"]


@pytest.mark.parametrize("missing", ["metrics.parquet", "shard.json", "part-00000.parquet"])
def test_shards_without_some_of_their_files(job, missing: str) -> None:
    job.write()
    for path in job.folder.completions.rglob(missing):
        path.unlink()
    page = read_page(job.folder)
    gone = {"metrics.parquet": {"usage"}, "shard.json": {"seconds", "cached"}, "part-00000.parquet": {"lengths"}}
    assert set(FIGURES) - set(page.figures) == gone[missing]


def test_no_sample_and_no_steps(job) -> None:
    job.num_sampled = job.num_steps = 0
    page = read_page(job.write())
    assert "usage" not in page.figures
    assert "predicted real shard 0 20" in page.text  # the table of shards begins with the first shard


def test_folders_of_steps_that_were_removed(job) -> None:
    job.write()
    shutil.rmtree(job.folder.work)
    shutil.rmtree(job.folder.sample)
    shutil.rmtree(job.folder.results)
    page = read_page(job.folder)
    assert page.figures == ["seconds", "cached", "usage"]


def test_a_shard_of_an_earlier_plan_counts_as_not_finished(job) -> None:
    job.write()
    path = job.folder.plan / "plan.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"plan-1"', '"plan-2"'), encoding="utf-8")
    assert "0 of 2 shards have run" in read_page(job.folder).text


def test_a_resumed_shard_is_left_out_of_the_speed(job) -> None:
    job.write()
    path = job.folder.completions / "shard-00000" / "shard.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"num_resumed": 0', '"num_resumed": 3'), encoding="utf-8")
    page = read_page(job.folder)
    assert "tokens/s of engine time 269" in page.text  # (22 * 100 + 22 * 10) / (4 + 5) seconds
    assert "A shard that was resumed may lack the last 30 seconds of an attempt that was killed" in page.text
    assert "(without the last 30 seconds of attempts that were killed)" in page.text


def test_a_summary_without_its_keys_and_an_incomplete_job(job) -> None:
    job.write()
    plan = job.folder.plan / "plan.json"
    plan.write_text(re.sub(r'"summary": \{.*\}', '"summary": {}\n', plan.read_text(encoding="utf-8"), flags=re.DOTALL))
    plan.write_text(plan.read_text(encoding="utf-8") + "}")
    write_manifest(job.folder.manifest, {"status": "incomplete", "counts": {**job.counts, "missing": 2}})
    page = read_page(job.folder)
    assert "orders 35 requests with 3,500 prompt tokens and an estimated 350 output tokens into 2 shards" in page.text
    assert "incomplete" in page.text
    assert "do not add up" in page.text


@pytest.mark.parametrize(
    ("summary", "expected", "unexpected"),
    [
        ({"num_requests": 0}, "orders 0 requests", "It should take"),
        ({"num_requests": 1}, "orders 1 request with", "1 requests"),
        ({"prefix_sharing_optimal": 0.0, "prefix_sharing": 0.0}, "No two of them begin alike", "No two prompts"),
        ({"has_prefix_cache": False}, "There is no prefix cache, so no prefix is shared.", "of what is possible"),
        ({"predicted_seconds": 900.0}, "It should take 15 min 00 s, summed over 2 GPUs", "15 min 00 s and took"),
    ],
)
def test_the_plan_in_words_says_what_is_so(job, summary: dict[str, object], expected: str, unexpected: str) -> None:
    job.spec = {"gpus": 2}
    job.write()
    plan = read_manifest(job.folder.plan / "plan.json", PlanManifest)
    plan = plan.model_copy(update={"summary": {**plan.summary, **summary}})
    write_manifest(job.folder.plan / "plan.json", plan)
    page = read_page(job.folder)
    assert expected in page.text
    assert unexpected not in page.text


def test_replaces_an_older_report_and_leaves_nothing_else(job) -> None:
    job.write()
    before = set(job.root.iterdir())
    job.folder.report.write_text("old")
    read_page(job.folder)
    assert set(job.root.iterdir()) == before | {job.folder.report}


def test_refuses_a_folder_without_a_job(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="holds no job"):
        write_report(JobFolder(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_large_job_stays_a_small_page(job) -> None:
    job.num_requests, job.num_steps, job.num_sampled = 20_000, 5_000, 100
    rng = np.random.default_rng(0)
    folder = job.write()
    shared = rng.integers(0, 400, job.num_requests + job.num_duplicates)
    columns = pq.read_table(folder.relation("sorted_requests"))
    place = schemas.SORTED_REQUESTS.get_field_index("shared_prefix_tokens")
    columns = columns.set_column(place, "shared_prefix_tokens", pa.array(shared, pa.int32()))
    pq.write_table(columns, folder.relation("sorted_requests"))
    read_page(folder)
    scripts = re.findall(r"<script type=.application/json.*?</script>", folder.report.read_text(), re.DOTALL)
    assert len(scripts) == len(FIGURES)
    assert sum(map(len, scripts)) < 400_000
