"""Workloads and `simulate`, from Parquet to the figures that the command line prints."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blendserve.errors import InputError, ModelError, UsageError
from blendserve.planner.simulate import POLICIES, simulate
from blendserve.planner.sorted_prompts import sort_prompts
from blendserve.planner.workload import draw_lengths, generate_workload

MACHINE = {"model": "llama-3.1-8b", "hardware": "a100-80gb"}


@pytest.mark.parametrize(("density", "sharing"), [(1.4, 0.35), (0.9, 0.05)])
def test_a_workload_has_the_density_and_sharing_asked_for(tmp_path, density, sharing):
    path = tmp_path / "workload.parquet"
    summary = generate_workload(path, density=density, sharing=sharing, num_requests=3000, **MACHINE)
    table = pq.read_table(path)
    assert table.num_rows == summary["num_requests"] == 3000
    prompts = sort_prompts(path, tmp_path)
    found = prompts.shared_prefix_tokens.sum() / prompts.num_prompt_tokens.sum()
    assert found == pytest.approx(summary["sharing"], abs=0.003)  # a few first tokens agree by chance
    assert found == pytest.approx(sharing, rel=0.15)
    assert summary["density"] == pytest.approx(density, rel=1e-3)
    assert summary["num_output_tokens"] == int(table.column("output_tokens").to_numpy().sum())


def test_the_same_seed_makes_the_same_workload(tmp_path):
    for name in ("a", "b"):
        generate_workload(tmp_path / name, density=1.0, sharing=0.2, num_requests=200, **MACHINE)
    assert pq.read_table(tmp_path / "a").equals(pq.read_table(tmp_path / "b"))


@pytest.mark.parametrize(
    ("source", "prompt", "output"),
    [("burstgpt", 1914, 55), ("sharegpt", 299, 324), ("mmlu", 683, 1), ("openvid", 40, 16_000)],
)
def test_quantile_tables_keep_the_means_of_the_traces(source, prompt, output):
    lengths = draw_lengths(source, 20_000, np.random.default_rng(0))
    assert lengths.prompt_tokens.mean() == pytest.approx(prompt, rel=0.06)
    assert lengths.output_tokens.mean() == pytest.approx(output, rel=0.03)


@pytest.mark.parametrize(("density", "sharing"), [(1000.0, 0.1), (1.0, 0.95)])
def test_a_mix_that_does_not_exist_is_refused(tmp_path, density, sharing):
    with pytest.raises(UsageError, match="No mix"):
        generate_workload(tmp_path / "w", density=density, sharing=sharing, num_requests=100, **MACHINE)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("lengths", ["known", "sampled"])
def test_simulate_answers_for_every_policy(tmp_path, lengths):
    path = tmp_path / "workload.parquet"
    generate_workload(path, density=1.2, sharing=0.4, num_requests=2000, **MACHINE)
    answer = simulate(path, lengths=lengths, gpus=2, **MACHINE)
    assert set(answer) == {
        "policies", "prefix_sharing_optimal", "bound_seconds", "planning_seconds", "peak_memory_bytes",
    }  # fmt: skip
    assert tuple(answer["policies"]) == POLICIES
    for figures in answer["policies"].values():
        assert set(figures) == {
            "seconds", "tokens_per_second", "prefix_sharing", "compute_seconds", "memory_seconds", "num_preemptions",
        }  # fmt: skip
        assert figures["seconds"] >= answer["bound_seconds"] * 0.999
        assert 0 <= figures["prefix_sharing"] <= answer["prefix_sharing_optimal"] + 1e-9
    blend = answer["policies"]["blend"]
    if lengths == "known":
        assert blend["prefix_sharing"] >= 0.95 * answer["prefix_sharing_optimal"]  # two devices compute some twice


def test_lengths_alone_share_nothing(tmp_path):
    path = tmp_path / "lengths.parquet"
    pq.write_table(pa.table({"input_tokens": [100.0, 20.0, 30.0], "output_tokens": [0.0, 5.0, 100_000.0]}), path)
    answer = simulate(path, policies=("blend", "dfs"), **MACHINE)
    assert answer["prefix_sharing_optimal"] == 0.0
    assert answer["policies"]["blend"]["seconds"] > 0


def test_an_empty_workload_takes_no_time(tmp_path):
    path = tmp_path / "empty.parquet"
    pq.write_table(
        pa.table({"input_tokens": pa.array([], pa.int32()), "output_tokens": pa.array([], pa.int32())}), path
    )
    answer = simulate(path, policies=("blend",), **MACHINE)
    assert answer["policies"]["blend"]["seconds"] == 0.0
    assert answer["bound_seconds"] == 0.0


def test_wrong_inputs_are_refused(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"tokens": [1]}), path)
    with pytest.raises(InputError, match="Expected output_tokens"):
        simulate(path, **MACHINE)
    with pytest.raises(InputError, match="can't be read"):
        simulate(tmp_path / "missing.parquet", **MACHINE)
    for wrong in (-1, None, float("nan")):
        pq.write_table(pa.table({"input_tokens": [5, 6], "output_tokens": [3, wrong]}), tmp_path / "wrong.parquet")
        with pytest.raises(InputError, match=r"in row 1 .*Expected 0 or more"):
            simulate(tmp_path / "wrong.parquet", **MACHINE)
    for wrong in ({"output_tokens": ["3"]}, {"input_tokens": ["5"]}, {"prompt_token_ids": ["text"]}):
        columns = {"output_tokens": [3], **({"input_tokens": [5]} if "output_tokens" in wrong else {}), **wrong}
        pq.write_table(pa.table(columns), tmp_path / "wrong.parquet")
        with pytest.raises(InputError, match=rf"{next(iter(wrong))} of type string\. Expected"):
            simulate(tmp_path / "wrong.parquet", **MACHINE)
    with pytest.raises(ModelError, match="Expected a model's folder"):
        simulate(path, model="gpt-17", hardware="a100-80gb")
    with pytest.raises(UsageError, match="Unknown hardware"):
        simulate(path, model="llama-3.1-8b", hardware="abacus")
    with pytest.raises(UsageError, match="weights take"):
        simulate(path, model="llama-3.1-70b", hardware="a100-80gb")
    with pytest.raises(UsageError, match="Unknown policies"):
        simulate(path, policies=("fastest",), **MACHINE)
