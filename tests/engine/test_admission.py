"""What running requests are expected to need, and how much memory there is for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blendserve.dual_scanner import Front
from blendserve.engine import device
from blendserve.engine.memory_forecast import MemoryForecast
from blendserve.engine.request import Request
from blendserve.engine.running import RunningRequests
from blendserve.engine_limits import EngineLimits, resolve_limits
from blendserve.errors import UsageError
from blendserve.spec import EngineSpec


def make_request(num_prompt: int, estimate: int, max_tokens: int = 1000) -> Request:
    return Request(
        position=0,
        row_index=0,
        request_id="0",
        prompt_token_ids=np.zeros(num_prompt, dtype=np.int32),
        max_tokens=max_tokens,
        estimated_output_tokens=estimate,
    )


def running_requests(requests: Sequence[Request]) -> RunningRequests:
    running = RunningRequests(max_num_seqs=8)
    for request in requests:
        running.admit(request, request.max_tokens)
    return running


@pytest.mark.parametrize(
    ("estimate", "generated", "max_tokens", "expected"),
    [
        (10, 0, 100, 10),
        (10, 9, 100, 1),
        (10, 10, 100, 10),
        (10, 19, 100, 1),
        (10, 20, 100, 20),
        (10, 39, 100, 1),
        (10, 40, 100, 40),
        (10, 30, 32, 2),
        (0, 3, 100, 1),
        (7, 7 * 2**40, 2**60, 7 * 2**40),
    ],
)
def test_a_request_that_outlives_its_estimate_is_expected_to_go_on(
    estimate: int, generated: int, max_tokens: int, expected: int
) -> None:
    running = running_requests([make_request(5, estimate, max_tokens)])
    rows = running.active_rows()
    running.generated_tokens[rows] = generated
    assert running.remaining_output_tokens(rows).tolist() == [expected]
    assert running.is_right(rows).tolist() == [generated > max(estimate, 1)]


def test_a_preempted_request_is_expected_to_go_on_too() -> None:
    request = make_request(5, 10)
    request.output_token_ids = [1] * 25
    assert request.remaining_output_tokens == 15
    assert running_requests([request]).remaining_output_tokens(np.array([0])).tolist() == [15]


@given(
    running=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), max_size=6),
    added=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40)), max_size=2),
    new=st.tuples(st.integers(1, 30), st.integers(1, 40)),
    capacity=st.integers(1, 250),
)
def test_the_forecast_is_the_peak_of_decoding_in_step(
    running: list[tuple[int, int]], added: list[tuple[int, int]], new: tuple[int, int], capacity: int
) -> None:
    everyone = [*running, *added, new]
    # A request with r tokens to go holds p + t after t of them and is gone after r.
    peak = max(sum(p + t for p, r in everyone if t <= r) for t in range(new[1] + 1))  # up to the end of the new one
    requests = [make_request(prompt, output) for prompt, output in running]
    forecast = MemoryForecast(running_requests(requests), num_used_tokens=0, capacity_tokens=capacity, block_size=1)
    for prompt, output in added:
        forecast.add(make_request(prompt, output), 0, 0)
    assert forecast.fits(make_request(*new), 0, 0) == (peak <= capacity)
    assert forecast.footprint_tokens[Front.LEFT] == sum(p + d / 2 for p, d in [*running, *added])


def test_cached_tokens_count_once() -> None:
    forecast = MemoryForecast(RunningRequests(1), num_used_tokens=0, capacity_tokens=100, block_size=1)
    assert not forecast.fits(make_request(95, 10), 0, 0)
    assert forecast.fits(make_request(95, 10), num_cached_tokens=16, num_revived_tokens=0)
    assert not forecast.fits(make_request(95, 10), num_cached_tokens=16, num_revived_tokens=16)


def test_half_a_block_of_each_request_stays_empty() -> None:
    forecast = MemoryForecast(
        running_requests([make_request(20, 10)]), num_used_tokens=0, capacity_tokens=100, block_size=16
    )
    assert forecast.fits(make_request(44, 10), 0, 0)  # 30 + 54 and twice 8
    assert not forecast.fits(make_request(45, 10), 0, 0)


def test_no_more_blocks_than_memory_or_use() -> None:
    assert device.count_blocks(1000, 100, max_useful_blocks=50) == 10
    assert device.count_blocks(10000, 100, max_useful_blocks=50) == 50
    with pytest.raises(UsageError, match="150 bytes are free for it, a block takes 100"):
        device.count_blocks(150, 100, max_useful_blocks=50)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="torch sees no GPU"):
        device.resolve_device(EngineSpec(device="cuda"))
    assert device.resolve_device(EngineSpec()) == torch.device("cpu")
    assert device.resolve_dtype(EngineSpec(), torch.device("cpu")) is torch.float32
    assert device.resolve_dtype(EngineSpec(), torch.device("cuda")) is torch.bfloat16
    assert device.resolve_dtype(EngineSpec(dtype="float16"), torch.device("cpu")) is torch.float16


def test_sizes_that_are_left_open_suit_the_device() -> None:
    assert resolve_limits(EngineSpec(), is_gpu=False) == EngineLimits(16, 64, 512)
    assert resolve_limits(EngineSpec(), is_gpu=True) == EngineLimits(128, 1024, 8192)
    assert resolve_limits(EngineSpec(block_size=32, max_num_seqs=2), is_gpu=True) == EngineLimits(32, 2, 8192)


def test_a_container_limit_bounds_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:

    limit = tmp_path / "memory.max"
    limit.write_text("400000\n")
    monkeypatch.setattr(device, "_CONTAINER_LIMITS", (limit,))
    assert device.free_memory_bytes(torch.device("cpu"), 0) == 100000
    limit.write_text("max\n")
    assert device.free_memory_bytes(torch.device("cpu"), 0) > 100000
