"""The steps analyze, sample and plan on whole small jobs: what comes out is a plan of every request that has to run."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blendserve.hardware_profile import ProfiledModel, write_profile
from blendserve.manifest import PlanManifest, read_manifest
from blendserve.planner.analyze import analyze
from blendserve.planner.performance_model import (
    BUILT_IN_MODELS,
    as_achieved,
    load_hardware,
    load_model_shape,
    step_floor_seconds,
)
from blendserve.planner.plan import make_plan
from blendserve.planner.policy_comparison import compare_policies
from blendserve.planner.predicted_time import predict_seconds
from blendserve.planner.sample import write_sample_plan
from blendserve.schemas import (
    OUTPUT_LENGTH_ESTIMATES,
    PREDICTED_USAGE,
    PREFIX_NODES,
    REQUEST_COSTS,
    REQUEST_ORDER,
    SCHEDULED_REQUESTS,
    SORTED_REQUESTS,
)
from tests.planner.jobs import make_spec, scheduled_rows, write_completions, write_job, write_model
from tests.profiles import make_profile

LLAMA = BUILT_IN_MODELS["llama-3.1-8b"]
LARGE = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
POLICIES = ["blend", "dfs", "fcfs", "random", "longest"]
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=0, max_size=30)


def three_kinds(count: int) -> tuple[list[list[int]], list[int | None]]:
    """Short answers under one instruction, summaries of own paragraphs, long answers to short prompts."""
    random = np.random.default_rng(0)
    prompts, hints = [], []
    for index in range(count):
        own = random.integers(100, 900, 6).tolist()
        kind = index % 3
        prompts.append([[5] * 200 + own, [6] * 3 + own + random.integers(100, 900, 200).tolist(), [8] * 3 + own][kind])
        hints.append([2, 60, 900][kind])
    return prompts, hints


def run_planner(tmp_path: Path, prompts, *, max_tokens=1000, hints=None, dedupe=True, **options):
    folder = write_job(tmp_path / "job", prompts, max_tokens=max_tokens, hints=hints)
    summary = analyze(folder, dedupe=dedupe)
    manifest = make_plan(folder, make_spec(folder, **options), write_model(tmp_path / "model"))
    return folder, summary, manifest


@settings(max_examples=12, deadline=None)
@given(prompts=PROMPTS, policy=st.sampled_from(POLICIES), num_shards=st.integers(1, 4), dedupe=st.booleans())
def test_each_request_stands_in_exactly_one_shard(tmp_path_factory, prompts, policy, num_shards, dedupe):
    folder, summary, manifest = run_planner(
        tmp_path_factory.mktemp("plan"), prompts, dedupe=dedupe, policy=policy, shards=num_shards
    )
    shards = scheduled_rows(folder, manifest.shards)
    planned = [row for shard in shards for row in shard]
    expected = {tuple(prompt) for prompt in prompts}
    if dedupe:
        assert Counter(tuple(row["prompt_token_ids"]) for row in planned) == Counter(expected)
        assert summary.num_duplicates == len(prompts) - len(expected)
    else:
        assert sorted(row["row_index"] for row in planned) == list(range(len(prompts)))
    assert len(shards) == min(num_shards, len(planned))
    for shard in shards:
        assert [row["shard_position"] for row in shard] == list(range(len(shard)))
        assert shard[0]["shared_prefix_tokens"] == 0
        densities = [row["unit_density"] for row in shard]
        if manifest.is_two_ended:
            assert densities == sorted(densities, reverse=True)
    for row in planned:
        assert row["prompt_token_ids"] == prompts[row["row_index"]]
        assert row["request_id"] == f"request-{row['row_index']}"


@pytest.mark.parametrize("policy", POLICIES)
def test_relations_have_their_declared_schemas(tmp_path, policy):
    prompts, hints = three_kinds(30)
    folder, _, manifest = run_planner(tmp_path, prompts, hints=hints, policy=policy, shards=2)
    for name, schema in {
        "sorted_requests": SORTED_REQUESTS,
        "prefix_nodes": PREFIX_NODES,
        "output_length_estimates": OUTPUT_LENGTH_ESTIMATES,
        "request_costs": REQUEST_COSTS,
        "request_order": REQUEST_ORDER,
        "predicted_usage": PREDICTED_USAGE,
    }.items():
        assert pq.read_schema(folder.relation(name)).equals(schema), name
    for shard in manifest.shards:
        assert pq.read_schema(folder.plan / shard.file).equals(SCHEDULED_REQUESTS)
    assert read_manifest(folder.plan / "plan.json", PlanManifest) == manifest
    assert set(pq.read_table(folder.relation("predicted_usage")).column("policy").to_pylist()) == set(POLICIES)
    costs = pq.read_table(folder.relation("request_costs")).to_pylist()
    assert all(row["density"] == row["compute_seconds"] / row["memory_seconds"] for row in costs)


def test_blend_sorts_by_density_and_keeps_the_sharing(tmp_path):
    prompts, hints = three_kinds(90)
    folder, analyzed, manifest = run_planner(tmp_path, prompts, hints=hints)
    rows = scheduled_rows(folder, manifest.shards)[0]
    kinds = [row["prompt_token_ids"][0] for row in rows]
    assert kinds[-30:] == [8] * 30  # long answers at the memory-heavy end
    summary = manifest.summary
    assert summary["prefix_sharing_optimal"] == pytest.approx(analyzed.prefix_sharing)
    assert summary["prefix_sharing"] >= 0.99 * summary["prefix_sharing_optimal"]
    assert summary["density_left"] > summary["density"] > summary["density_right"]
    # Predicted is what the engine does: without a profile that says otherwise, one kind of work after the other.
    assert summary["predicted_seconds"] == summary["compute_seconds"] + summary["memory_seconds"]
    assert summary["overlapped_seconds"] >= max(summary["compute_seconds"], summary["memory_seconds"]) * (1 - 1e-9)
    assert summary["overlapped_seconds"] >= summary["bound_seconds"] * (1 - 1e-9)


def test_shards_of_blend_hold_equal_compute_and_equal_memory_time(tmp_path):
    # One number isn't enough: equal total time would put the compute into one shard and the memory into another.
    prompts, hints = three_kinds(300)
    _, _, manifest = run_planner(tmp_path, prompts, hints=hints, shards=3)
    for name in ("compute_seconds", "memory_seconds"):
        parts = [getattr(shard, name) for shard in manifest.shards]
        assert max(parts) < 1.1 * min(parts), name


def test_duplicates_and_finished_rows_are_left_out(tmp_path):
    folder = write_job(tmp_path / "job", [[1, 2], [1, 2], [3], [4], [5]])
    assert analyze(folder, dedupe=True).num_duplicates == 1
    write_completions(folder, "sample/shard-00000", {2: (3, "stop"), 3: (0, "error")})
    manifest = make_plan(folder, make_spec(folder), write_model(tmp_path / "model"))
    rows = scheduled_rows(folder, manifest.shards)[0]
    assert sorted(row["row_index"] for row in rows) == [0, 3, 4]


def test_rows_with_another_limit_are_no_duplicates(tmp_path):
    folder = write_job(tmp_path / "job", [[1], [1], [1]], max_tokens=[5, 6, 5])
    assert analyze(folder, dedupe=True).num_duplicates == 1
    answers = pq.read_table(folder.relation("sorted_requests")).column("duplicate_of").to_pylist()
    assert answers == [None, None, 0]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_job_with_nothing_left_has_a_valid_plan_of_no_shards(tmp_path, policy):
    folder = write_job(tmp_path / "job", [[1], [2]])
    analyze(folder, dedupe=True)
    write_completions(folder, "sample/shard-00000", {0: (3, "stop"), 1: (64, "length")})
    manifest = make_plan(folder, make_spec(folder, policy=policy), write_model(tmp_path / "model"))
    assert manifest.shards == ()
    assert manifest.summary["warnings"] == ["Nothing is left to run."]


@pytest.mark.parametrize(
    ("prompts", "hints"),
    [
        ([[1, 2, 3]], [5]),
        ([[1, 2, 3]] * 20, [5] * 20),
        ([[row] for row in range(20)], [5] * 20),
        ([[row] * 50 for row in range(20)], [1] * 20),
        ([[row] for row in range(20)], [10**9] * 20),
        ([[row] for row in range(20)], [0] * 20),
        ([[row] for row in range(20)], [1000] * 20),
    ],
    ids=[
        "one request",
        "all identical",
        "nothing shared",
        "all compute-heavy",
        "absurdly long",
        "absurdly short",
        "all memory-heavy",
    ],
)
def test_odd_jobs_have_valid_plans(tmp_path, prompts, hints):
    folder, _, manifest = run_planner(tmp_path, prompts, hints=hints, dedupe=False, shards=2)
    planned = [row for shard in scheduled_rows(folder, manifest.shards) for row in shard]
    assert len(planned) == len(prompts)
    assert all(1 <= row["estimated_output_tokens"] <= 1000 for row in planned)
    assert all(
        np.isfinite([row["compute_seconds"], row["memory_seconds"], row["unit_density"]]).all() for row in planned
    )


def test_planning_again_gives_the_same_plan_and_leaves_no_stale_shards(tmp_path):
    prompts, hints = three_kinds(30)
    folder, _, first = run_planner(tmp_path, prompts, hints=hints)
    spec = make_spec(folder)
    assert make_plan(folder, spec, tmp_path / "model") == first
    second = make_plan(folder, spec.model_copy(update={"policy": "dfs"}), tmp_path / "model")
    assert second.plan_id != first.plan_id
    assert [path.name for path in folder.plan.glob("shards-*")] == [f"shards-{second.plan_id}"]


def test_the_sample_is_one_shard_that_covers_every_subtree(tmp_path):
    prompts, _ = three_kinds(600)
    prompts += [[7, 9, row] for row in range(100, 110)]  # a small subtree that a uniform sample of 16 would miss
    folder = write_job(tmp_path / "job", prompts, max_tokens=1000)
    analyze(folder, dedupe=True)
    spec, model = make_spec(folder), write_model(tmp_path / "model")
    count = write_sample_plan(folder, spec, model)
    plan = read_manifest(folder.sample / "plan.json", PlanManifest)
    assert not plan.is_two_ended
    assert plan.completions == "../completions/sample"
    rows = pq.read_table(folder.sample / plan.shards[0].file).to_pylist()
    assert len(rows) == count
    sampled, companions = rows[:16], rows[16:]
    assert plan.summary["num_sampled"] == 16
    assert {row["prompt_token_ids"][0] for row in sampled} == {5, 6, 7, 8}
    # Long outputs aren't left to decode alone: prompts with much to prefill run beside them.
    assert companions
    assert {row["prompt_token_ids"][0] for row in companions} == {6}


@pytest.mark.parametrize(
    ("count", "hints", "options"),
    [
        (31, None, {}),
        (40, [3] * 40, {}),
        (40, None, {"ignore_eos": True}),
        (40, None, {"sample_fraction": 0.0}),
    ],
    ids=["few requests", "all hinted", "lengths fixed", "switched off"],
)
def test_no_sample_where_none_is_needed(tmp_path, count, hints, options):
    folder = write_job(tmp_path / "job", [[row, 1] for row in range(count)], max_tokens=100, hints=hints)
    analyze(folder, dedupe=True)
    assert write_sample_plan(folder, make_spec(folder, **options), write_model(tmp_path / "model")) == 0
    assert not (folder.sample / "plan.json").exists()


def test_no_sample_of_short_completions(tmp_path):
    folder = write_job(tmp_path / "job", [[row, 1] for row in range(40)], max_tokens=16)
    analyze(folder, dedupe=True)
    assert write_sample_plan(folder, make_spec(folder), write_model(tmp_path / "model")) == 0


@pytest.mark.parametrize("hardware", ["cpu", "a100-80gb"])
def test_policies_are_compared_before_anything_runs(tmp_path, hardware):
    prompts, hints = three_kinds(120)
    folder = write_job(tmp_path / "job", prompts, max_tokens=1000, hints=hints)
    analyze(folder, dedupe=True)
    spec = make_spec(folder, hardware=hardware, device_hour_price=2.5)
    comparison = compare_policies(folder, spec, write_model(tmp_path / "model"))
    assert list(comparison["policies"]) == POLICIES
    for figures in comparison["policies"].values():
        assert figures["seconds"] >= comparison["bound_seconds"] * 0.999
        assert figures["prefix_sharing"] <= comparison["prefix_sharing_optimal"] + 1e-9
        assert figures["cost"] == pytest.approx(2.5 * figures["seconds"] / 3600)
    assert comparison["policies"]["blend"]["prefix_sharing"] >= 0.99 * comparison["prefix_sharing_optimal"]


@pytest.mark.parametrize(
    "options", [{}, {"max_num_seqs": 8}, {"num_blocks": 100}, {"prefix_cache": False}, {"count": 1}]
)
def test_a_plan_says_the_same_time_in_all_places_whatever_the_engine_is_allowed(tmp_path, options):
    prompts, hints = three_kinds(options.pop("count", 120))
    folder = write_job(tmp_path / "job", prompts, max_tokens=1000, hints=hints)
    analyze(folder, dedupe=True)
    spec, model = make_spec(folder, hardware="h100", **options), write_model(tmp_path / "model", **LARGE)
    summary = make_plan(folder, spec, model).summary
    predicted = summary["predicted_seconds"]
    assert predicted / 2 <= summary["overlapped_seconds"] <= predicted
    compared = compare_policies(folder, spec, model)["policies"]
    drawn = pq.read_table(folder.relation("predicted_usage"))
    for policy in POLICIES:
        started = drawn.filter(pc.equal(drawn["policy"], policy))["started_seconds"].to_numpy()
        assert started[-1] <= compared[policy]["seconds"] <= 2 * started[-1] - started[-2], policy
    assert 0.5 <= predicted / compared["blend"]["seconds"] <= 1.1


def test_a_prefix_is_planned_with_only_where_the_engine_keeps_it(tmp_path):
    prompts, hints = three_kinds(30)
    _, _, manifest = run_planner(tmp_path, prompts, hints=hints, prefix_cache=False)
    assert (manifest.summary["prefix_sharing"], manifest.summary["prefix_sharing_optimal"]) == (0, 0)
    assert "There is no prefix cache" in " ".join(manifest.summary["warnings"])
    _, _, shared = run_planner(tmp_path / "shared", prompts, hints=hints)
    assert shared.summary["compute_seconds"] < 0.95 * manifest.summary["compute_seconds"]


def test_policies_are_compared_on_as_many_gpus_as_the_job_has(tmp_path):
    prompts, hints = three_kinds(120)
    folder = write_job(tmp_path / "job", prompts, max_tokens=1000, hints=hints)
    analyze(folder, dedupe=True)
    model = write_model(tmp_path / "model", **LARGE)

    def compared(**options):
        return compare_policies(folder, make_spec(folder, hardware="h100", **options), model)

    one, two = compared(), compared(gpus=2)
    assert compared(shards=4) == one
    assert compared(shards=1, gpus=2) == one  # a shard runs on one GPU
    assert two["bound_seconds"] == one["bound_seconds"] / 2
    blend = two["policies"]["blend"]
    assert two["bound_seconds"] < blend["seconds"] < one["policies"]["blend"]["seconds"]
    assert blend["device_hours"] > 1.5 * blend["seconds"] / 3600


def test_small_blocks_leave_less_of_the_cache_unfilled(tmp_path):
    prompts, hints = three_kinds(300)
    folder = write_job(tmp_path / "job", prompts, max_tokens=1000, hints=hints)
    analyze(folder, dedupe=True)
    model = write_model(tmp_path / "model", **LARGE)
    large, small = (
        compare_policies(folder, make_spec(folder, hardware="h100", num_blocks=12_800 // size, block_size=size), model)
        for size in (128, 16)
    )
    assert small["policies"]["blend"]["seconds"] < 0.95 * large["policies"]["blend"]["seconds"]


def test_the_promised_time_is_that_of_the_engine_as_it_will_run(tmp_path):
    prompts, hints = three_kinds(120)
    folder = write_job(tmp_path / "job", prompts, max_tokens=1000, hints=hints)
    analyze(folder, dedupe=True)
    model = write_model(tmp_path / "model")
    profile = tmp_path / "profile.json"
    write_profile(profile, make_profile(model=ProfiledModel.of(load_model_shape(model)), interference=0.5))

    def compared(hardware, overlap):
        return compare_policies(folder, make_spec(folder, hardware=hardware, overlap=overlap), model)["policies"]

    sheet, profiled = compared("h100", "off"), compared(str(profile), "off")
    assert compared("h100", "on") == sheet  # the engine overlaps nothing before it is measured
    overlapped = compared(str(profile), "on")
    for policy in POLICIES:
        figures = sheet[policy]
        assert figures["seconds"] >= (figures["compute_seconds"] + figures["memory_seconds"]) * 0.999
        assert overlapped[policy]["seconds"] < profiled[policy]["seconds"], policy


def test_a_predicted_time_counts_the_steps():
    hardware = replace(as_achieved(load_hardware("h100"), LLAMA), interference=1.0)

    def predict(output_tokens, cache_tokens=1_000_000):
        number = len(output_tokens)
        return predict_seconds(
            hardware,
            LLAMA,
            compute_seconds=10.0,
            memory_seconds=5.0,
            num_prompt_tokens=np.full(number, 100, np.int32),
            output_tokens=np.array(output_tokens),
            cache_tokens=cache_tokens,
            max_num_seqs=1024,
        )

    assert predict([0] * 10) == 15.0
    assert predict([1000] * 1024) == pytest.approx(15 + 1000 * 0.0024)
    assert predict([1000] * 2048) == pytest.approx(15 + 2000 * 0.0024)  # two waves
    # a hundred at a time: reading the weights takes longer than the products
    weights = step_floor_seconds(LLAMA, hardware)
    assert predict([1000] * 1024, cache_tokens=60_000) == pytest.approx(5 + 10_240 * (0.0024 + weights))
    assert predict([10_000]) > 70  # alone: the weights are read for every token


def test_a_job_of_no_requests_has_an_empty_plan(tmp_path):
    _, _, manifest = run_planner(tmp_path, [])
    assert manifest.shards == ()
    assert manifest.summary["num_requests"] == 0


@pytest.mark.parametrize(("hint", "warning"), [(1, "Compute-bound throughout"), (1000, "Memory-bound throughout")])
def test_a_job_on_one_side_says_that_blending_cannot_help(tmp_path, hint, warning):
    prompts = [[row, *([5] * (300 if hint == 1 else 0))] for row in range(20)]
    _, _, manifest = run_planner(tmp_path, prompts, hints=[hint] * 20, hardware="a100-80gb")
    assert any(warning in text for text in manifest.summary["warnings"])


def test_a_prompt_longer_than_the_cache_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("blendserve.planner.planned_engine.capacity_tokens", lambda shape, hardware: 100)
    _, _, manifest = run_planner(tmp_path, [[1] * 200, [2, 3]], hints=[5, 5])
    assert any("Longer than the KV cache of cpu: 1 prompt(s)" in text for text in manifest.summary["warnings"])
    assert sum(shard.num_requests for shard in manifest.shards) == 2


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {"max_tokens": 1}])
def test_lengths_that_can_be_no_other_are_not_unknown(tmp_path, options):
    _, _, manifest = run_planner(tmp_path, [[1], [2, 3]], max_tokens=options.pop("max_tokens", 9), **options)
    assert manifest.summary["output_length_sources"]["fixed"] == 2
    assert not any("unknown" in text for text in manifest.summary["warnings"])


def test_a_cache_of_stated_size_is_too_small_for_what_the_plan_says(tmp_path):
    _, _, manifest = run_planner(tmp_path, [[1] * 200, [2, 3]], hints=[5, 5], num_blocks=6, block_size=16)
    assert manifest.summary["num_too_long"] == 1


def test_a_model_that_does_not_fit_is_said_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("blendserve.planner.planned_engine.capacity_tokens", lambda shape, hardware: -1)
    _, _, manifest = run_planner(tmp_path, [[1], [2, 3]], hints=[5, 5])
    assert any("weights fill the memory of cpu" in text for text in manifest.summary["warnings"])
