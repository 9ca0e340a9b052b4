"""What the figures aggregate: the prefix tree, densities, output lengths, the timeline, reasons of failed rows."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from blendserve.manifest import StepCosts
from blendserve.planner.prefix_tree import build_prefix_tree
from blendserve.report.comparison_figures import _bin_lengths, draw_cached, draw_lengths, draw_seconds
from blendserve.report.density_figure import _read_steps, draw_density
from blendserve.report.figure_style import log_ticks
from blendserve.report.job_files import read_job
from blendserve.report.number_format import (
    count_of,
    divide,
    format_count,
    format_factor,
    format_ratio,
    format_seconds,
    format_share,
)
from blendserve.report.predicted_usage_figure import draw_predicted_usage
from blendserve.report.prefix_tree_figure import draw_prefix_tree
from blendserve.report.row_errors import group_errors
from blendserve.report.usage_figure import _SUMMED, draw_usage, read_timeline


def traces(chart) -> list[dict]:
    return json.loads(chart.data)["data"]


def write_shared(job, shared: np.ndarray) -> None:
    """Make `shared` [num_requests] the common prefixes of the job's sorted requests."""
    job.num_requests, job.num_duplicates, job.num_failed = len(shared), 0, 0
    job.write_record()
    job.write_tree()
    path = job.folder.relation("sorted_requests")
    table = pq.read_table(path)
    place = table.schema.get_field_index("shared_prefix_tokens")
    field = table.schema.field(place)
    pq.write_table(table.set_column(place, field, [shared.astype(np.int32)]), path)
    pq.write_table(build_prefix_tree(shared).to_table(), job.folder.relation("prefix_nodes"))


def test_every_prefix_of_a_small_tree_is_a_box(job) -> None:
    write_shared(job, np.array([0, 50, 50, 10, 0]))
    (icicle,) = traces(draw_prefix_tree(read_job(job.folder)))
    assert sorted(zip(icicle["labels"], icicle["parents"], icicle["values"], strict=True)) == [
        ("all prompts · 5 requests", "", 500),
        ("first 10 tokens · 4 requests", "prefix 0", 400),
        ("first 50 tokens · 3 requests", "prefix 1", 300),
        ("other · 1 request", "prefix 0", 100),
        ("other · 1 request", "prefix 1", 100),
    ]
    saved = next(text for text in icicle["hovertext"] if text.startswith("3 requests"))
    assert "33.3 % of the tokens repeat" in saved  # the second and third of 3 * 100 tokens repeat 50 each


@pytest.mark.parametrize("seed", range(5))
def test_small_prefixes_are_merged_and_no_token_is_lost(job, seed: int) -> None:
    random = np.random.default_rng(seed)
    shared = random.choice([0, 1, 2, 5, 20, 90], 5_000)
    shared[0] = 0
    write_shared(job, shared)
    (icicle,) = traces(draw_prefix_tree(read_job(job.folder)))
    assert 1 < len(icicle["ids"]) <= 300
    assert len(set(icicle["ids"])) == len(icicle["ids"])
    values = dict(zip(icicle["ids"], icicle["values"], strict=True))
    below: dict[str, int] = {}
    for parent, value in zip(icicle["parents"], icicle["values"], strict=True):
        below[parent] = below.get(parent, 0) + value
    assert below.pop("") == 100 * len(shared)
    assert all(values[parent] == total for parent, total in below.items())


def test_prompts_that_share_nothing_are_one_box(job) -> None:
    write_shared(job, np.zeros(7, np.int64))
    chart = draw_prefix_tree(read_job(job.folder))
    assert "No two prompts begin alike" in chart.caption
    assert len(traces(chart)[0]["ids"]) == 1


def test_density_steps_follow_units_and_shards() -> None:
    position = np.array([3, 0, 1, 2, 4])
    density = np.array([1.0, 4.0, 4.0, 1.0, 1.0])
    steps = _read_steps(position, density, np.array([1, 0, 0, 0, 1]))
    assert steps.start.tolist() == [0, 2, 3]
    assert steps.density.tolist() == [4.0, 1.0, 1.0]
    assert steps.shard_starts.tolist() == [0, 2]


def test_density_of_many_units_is_thinned_but_keeps_the_ends_of_shards() -> None:
    density = np.concatenate([np.linspace(9, 1, 30_000), np.linspace(8, 2, 30_000)])
    steps = _read_steps(np.arange(60_000), density, np.repeat([0, 1], 30_000))
    assert len(steps.start) <= 2_010
    assert steps.density[steps.shard_starts].tolist() == [9, 8]
    assert steps.density[np.append(steps.shard_starts[1:] - 1, -1)].tolist() == [1, 2]


def test_only_a_two_ended_plan_marks_the_right_front(job) -> None:
    job.write()
    assert [trace.get("name") for trace in traces(draw_density(read_job(job.folder)))][1:] == [
        "left front",
        "right front",
    ]
    job.policy = "dfs"
    job.write_plan()
    chart = draw_density(read_job(job.folder))
    assert [trace.get("name") for trace in traces(chart)][1:] == ["left front"]
    assert "policy dfs" in chart.caption


def test_lengths_are_compared_for_succeeded_requests_of_the_shards(job) -> None:
    job.write()
    chart = draw_lengths(read_job(job.folder))
    assert "mean of 34 finished requests" in chart.caption  # 40 less 5 sampled and 1 failed
    real, estimated = 6 + np.arange(5, 39) % 11, 8 + np.arange(5, 39) % 7
    assert f"{real.sum() / estimated.sum():.2f}× the estimate" in chart.caption
    assert "hint 20, sample 20" in chart.caption


def test_log_axes_have_a_few_readable_ticks() -> None:
    assert log_ticks(np.array([0.096, 3.73]))["ticktext"][2:6] == ["0.05", "0.1", "0.2", "0.5"]
    assert "tickvals" not in log_ticks(np.array([1e-9, 1e9]))
    assert "tickvals" not in log_ticks(np.array([0.0, np.nan]))
    assert "tickvals" not in log_ticks(np.array([15.6, 34.7]))  # 20 would stand alone
    assert log_ticks(np.array([0.32404137931, 0.32404137931]))["ticktext"] == ["0.324"]


def test_few_estimates_are_bins_of_their_own_and_many_are_grouped() -> None:
    few = _bin_lengths(np.array([5, 9, 5, 9, 9]), np.array([4, 9, 6, 8, 13]))
    assert few.estimated.tolist() == [5, 9]
    assert few.mean.tolist() == [5, 10]
    assert few.num_requests.tolist() == [2, 3]
    estimated = np.random.default_rng(0).permutation(1000)
    many = _bin_lengths(estimated, estimated * 2)
    assert len(many.mean) <= 24
    assert many.num_requests.sum() == 1000
    assert np.allclose(many.mean, 2 * many.estimated)


def test_cached_share_is_that_of_prompt_tokens(job) -> None:
    job.write()
    chart = draw_cached(read_job(job.folder))
    assert "lets 40.0 % of the prompt tokens be reused, and 32.0 % were found" in chart.caption


def test_timeline_of_few_steps_is_every_step(job) -> None:
    job.write()
    timeline = read_timeline(read_job(job.folder))
    assert timeline is not None
    assert timeline.num_steps == len(timeline.seconds) == 90
    assert timeline.num_preempted == 3
    assert [name for name, _ in timeline.run_starts] == ["sample", "shard 0", "shard 1"]
    assert np.all(np.diff(timeline.seconds) > 0)
    assert timeline.num_seconds > timeline.seconds[-1]


def test_timeline_of_many_steps_keeps_means_and_maxima(job) -> None:
    job.num_steps, job.num_shards, job.num_sampled = 20_000, 1, 0
    job.write()
    timeline = read_timeline(read_job(job.folder))
    assert timeline is not None
    metrics = pq.read_table(job.folder.completions / "shard-00000" / "metrics.parquet")
    assert 500 < len(timeline.seconds) <= 600
    assert set(timeline.means) == {*_SUMMED, "compute_share", "memory_share"}
    for name in _SUMMED:
        column = metrics.column(name).to_numpy()
        assert column.min() <= timeline.means[name].min()
        assert np.mean(timeline.means[name]) == pytest.approx(column.mean(), rel=0.01)
    assert timeline.max_step_seconds.max() == metrics.column("step_seconds").to_numpy().max()
    assert "20,000 steps" in draw_usage(read_job(job.folder)).caption


def test_the_work_of_a_step_is_drawn_as_the_plan_prices_it(job) -> None:
    job.num_sampled, job.num_shards, job.num_steps = 0, 1, 40
    job.step_costs = StepCosts(seconds_per_token=1e-4, seconds_per_sampled_token=1e-5, seconds_per_kv_byte=1e-9)
    job.write()
    timeline = read_timeline(read_job(job.folder))
    assert timeline is not None
    prefill, decodes, kv_bytes, seconds = (
        timeline.means[name] for name in ("num_prefill_tokens", "num_decode_tokens", "kv_read_bytes", "step_seconds")
    )
    compute = (1e-4 * prefill + 1.1e-4 * decodes) / seconds
    assert timeline.means["compute_share"] == pytest.approx(compute)
    assert timeline.means["memory_share"] == pytest.approx(1e-9 * kv_bytes / seconds)


def test_tooltips_have_the_units_of_their_axes(job) -> None:
    job.step_costs = StepCosts(seconds_per_token=1e-4, seconds_per_sampled_token=1e-5, seconds_per_kv_byte=1e-9)
    job.write()
    files = read_job(job.folder)
    for chart in (draw_usage(files), draw_predicted_usage(files)):
        assert json.loads(chart.data)["layout"]["xaxis"]["ticksuffix"] == " s"
    formats = {trace["name"]: trace["hovertemplate"] for trace in traces(draw_usage(files))}
    assert formats["prefill"].startswith("%{y:,.1~f} ")
    assert formats["compute"].startswith("%{y:.0%} ")
    assert formats["mean"].startswith("%{y:.3~s}s ")
    seconds, cached = (traces(draw(files)) for draw in (draw_seconds, draw_cached))
    assert seconds[1]["customdata"] == ["4 s", "4 s", "5 s"]
    assert cached[0]["customdata"][0] == "40.0 %"


def test_a_plan_of_an_earlier_version_says_nothing_of_the_work_of_a_step(job) -> None:
    job.write()
    timeline = read_timeline(read_job(job.folder))
    assert timeline is not None
    assert np.isnan(timeline.means["compute_share"]).all()
    assert draw_usage(read_job(job.folder)).data is not None


def test_reasons_are_grouped_without_numbers_and_quotes(job) -> None:
    job.rejections = (
        *(f"the prompt has {length} tokens, more than 2048" for length in range(3000, 3050)),
        "column 'prompt', which the template names, is null",
        "the template fails on this row: ValueError: invalid literal: 'my secret text'",
        "the template fails on this row: ValueError: invalid literal: " + repr('it\'s a "secret" text'),
        "the row can't be read: 'my secret text' isn't one",
    )
    job.write()
    errors = group_errors(read_job(job.folder))
    assert errors is not None
    assert [(reason.outcome, reason.text, reason.num_rows) for reason in errors.reasons][:1] == [
        ("rejected", "the prompt has N tokens, more than N", 50)
    ]
    texts = [reason.text for reason in errors.reasons]
    assert "column 'prompt', which the template names, is null" in texts
    assert "the template fails on this row: ValueError: invalid literal: ‘…’" in texts
    assert "the row can't be read: ‘…’ isn't one" in texts
    assert not any("secret" in text or "it" in text.split() for text in texts)
    assert sum(reason.num_rows for reason in errors.reasons) == 55
    assert errors.num_others == 0


def test_many_reasons_are_cut_and_the_rest_counted(job) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    job.rejections = tuple(f"reason {first}{second}" for first in letters[:2] for second in letters)
    job.write()
    errors = group_errors(read_job(job.folder))
    assert errors is not None
    assert len(errors.reasons) == 30
    assert errors.num_others == 52 + 1 - 30


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (format_count(None), "–"),
        (format_count(999_999), "999,999"),
        (format_count(3_210_000), "3.21 M"),
        (format_count(float("nan")), "–"),
        (format_seconds(0.34), "340 ms"),
        (format_seconds(4.213), "4.21 s"),
        (format_seconds(99.96), "1 min 40 s"),
        (format_seconds(7_500), "2 h 05 min"),
        (format_share(0.3514), "35.1 %"),
        (count_of(1, "request"), "1 request"),
        (count_of(1_234, "request"), "1,234 requests"),
        (format_ratio(0.09618), "0.0962"),
        (format_ratio(999.4), "999"),
        (format_ratio(12_345.6), "12,346"),
        (format_factor(1_234.5), "1,234×"),
        (format_factor(1.0), "1.00×"),
        (format_factor(23.57), "23.6×"),
        (str(divide(1, 0)), "None"),
    ],
)
def test_numbers_for_people(text: str, expected: str) -> None:
    assert text == expected


def test_predicted_use_has_a_panel_for_each_policy_on_one_axis(job):
    job.write()
    chart = draw_predicted_usage(read_job(job.folder))
    drawn = traces(chart)
    assert [trace["name"] for trace in drawn] == ["compute", "memory bandwidth", "KV cache held"] * 2
    assert {trace["yaxis"] for trace in drawn} == {"y", "y2"}
    assert "blend 20 s, depth first 40 s" in chart.caption


@pytest.mark.parametrize("num_pieces", [None, 0])
def test_predicted_use_of_nothing_is_a_sentence(job, num_pieces):
    job.write_record()
    if num_pieces is not None:
        job.write_predicted_usage(num_pieces)
    assert draw_predicted_usage(read_job(job.folder)).data is None
