"""`request_costs` against figures worked out by hand, one for each way of reading the formulas wrongly."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from blendserve.planner.performance_model import BUILT_IN_HARDWARE, BUILT_IN_MODELS, cost_constants
from tests.golden.relations import rows_of

UNITS = {
    "seconds_per_layer_token": 1.0,
    "seconds_per_sampled_token": 100.0,
    "seconds_per_attended_pair": 10000.0,
    "seconds_per_kv_token": 1.0,
    "prefix_readers": 1.0,
}
LLAMA = asdict(cost_constants(BUILT_IN_MODELS["llama-3.1-8b"], BUILT_IN_HARDWARE["a100-80gb"]))


def costs_of(tmp_path, *requests: tuple[float, float, float, float], constants=UNITS) -> list[dict]:
    """`requests`: (prompt tokens, shared tokens, mean output tokens, mean square)."""
    names = ("num_prompt_tokens", "shared_prefix_tokens", "mean_output_tokens", "mean_square_output_tokens")
    columns = {name: [float(request[index]) for request in requests] for index, name in enumerate(names)}
    tables = {"expected_lengths": {"row_index": list(range(len(requests))), **columns}}
    return sorted(rows_of(tmp_path, "request_costs", tables, **constants), key=lambda row: row["row_index"])


def test_a_request_by_hand(tmp_path):
    (row,) = costs_of(tmp_path, (4, 1, 3, 9))
    # 3 prefill tokens and 2 decode steps through the layers, 3 sampled tokens, (16 - 1) / 2 causal pairs
    assert row["compute_seconds"] == 5 * 1.0 + 3 * 100.0 + 7.5 * 10000.0
    # the two decode steps read 4 + 1 and 4 + 2 tokens
    assert row["memory_seconds"] == 5 + 6
    assert row["density"] == row["compute_seconds"] / 11


def test_the_first_output_token_comes_out_of_the_prefill(tmp_path):
    # Read literally, d = 1 reads p + 1 KV tokens in decode. It reads none; what it writes is the floor.
    (row,) = costs_of(tmp_path, (100, 90, 1, 1))
    assert row["memory_seconds"] == 10
    assert row["compute_seconds"] == 10 + 100 + (100**2 - 90**2) / 2 * 10000


def test_no_output_and_nothing_to_prefill_is_no_division_by_zero(tmp_path):
    (row,) = costs_of(tmp_path, (5, 5, 0, 0))
    assert (row["compute_seconds"], row["memory_seconds"], row["density"]) == (0.0, 1.0, 0.0)


def test_memory_time_takes_the_mean_square_not_the_square_of_the_mean(tmp_path):
    short, long, mixed = costs_of(tmp_path, (10, 0, 1, 1), (10, 0, 1999, 1999**2), (10, 0, 1000, (1 + 1999**2) / 2))
    exact = (long["memory_seconds"] + short["memory_seconds"] - 10) / 2  # less the floor of the short one
    assert mixed["memory_seconds"] == pytest.approx(exact)
    (by_mean,) = costs_of(tmp_path, (10, 0, 1000, 1000**2))
    assert exact > 1.9 * by_mean["memory_seconds"]


def test_sharing_discounts_the_prefill_only(tmp_path):
    alone, shared = costs_of(tmp_path, (100, 0, 1000, 1000**2), (100, 100, 1000, 1000**2), constants=LLAMA)
    assert shared["memory_seconds"] == alone["memory_seconds"]
    assert 0.85 < shared["compute_seconds"] / alone["compute_seconds"] < 0.95  # read literally: 0


def test_the_squared_term_is_kept_and_causal(tmp_path):
    (row,) = costs_of(tmp_path, (12000, 0, 1, 1), constants=LLAMA)
    model, flops = BUILT_IN_MODELS["llama-3.1-8b"], 312e12
    gemms = (2 * model.layer_parameters * 12000 + 2 * model.head_parameters) / flops
    attention = 2 * 12000**2 * 4096 * 32 / flops  # half of the paper's 4 p^2 H L
    assert row["compute_seconds"] == pytest.approx(gemms + attention)
    assert attention > 0.2 * gemms


def test_the_output_head_runs_on_sampled_tokens_only(tmp_path):
    (row,) = costs_of(tmp_path, (1000, 0, 1, 1), constants={**LLAMA, "seconds_per_attended_pair": 0.0})
    assert row["compute_seconds"] == pytest.approx((2 * 6.979e9 * 1000 + 2 * 4096 * 128256) / 312e12, rel=1e-3)


def test_density_of_a_trace_mean_agrees_with_the_table_of_the_paper(tmp_path):
    # Azure code 2023 has a density of 28 on an A100 at data-sheet peaks; ShareGPT's mean lengths give about 2.9.
    (chat,) = costs_of(tmp_path, (299, 0, 324, 324**2), constants=LLAMA)
    assert 2.0 < chat["density"] < 3.5


def test_a_shared_prefix_kernel_reads_a_prefix_once_for_all_who_share_it(tmp_path):
    # "Prefix hits do not reduce memory traffic" holds for kernels that read it for each request, and only for them.
    paged = costs_of(tmp_path, (100, 80, 11, 121))[0]
    together = costs_of(tmp_path, (100, 80, 11, 121), constants={**UNITS, "prefix_readers": 4.0})[0]
    assert paged["memory_seconds"] == 10 * 100 + 55
    assert together["memory_seconds"] == 10 * (20 + 80 / 4) + 55
    assert together["compute_seconds"] == paged["compute_seconds"]
