"""The Triton sampling against its twin: the same tokens."""

from __future__ import annotations

import pytest
import torch

from blendserve_kernels import reference
from blendserve_kernels.sampling import greedy, greedy_checked, sample_checked
from blendserve_kernels.triton_kernels import sampling
from blendserve_kernels.triton_kernels.sampling import greedy_triton, sample_triton


def _arguments(num_rows: int, device: torch.device, **settings: float) -> tuple[torch.Tensor, ...]:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    return (
        torch.full((num_rows,), values["temperature"], device=device),
        torch.full((num_rows,), int(values["top_k"]), dtype=torch.int32, device=device),
        torch.full((num_rows,), values["top_p"], device=device),
        torch.full((num_rows,), values["min_p"], device=device),
        torch.arange(num_rows, device=device) * 977 - 3,
        torch.arange(num_rows, device=device),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 5},
        {"top_k": 40, "top_p": 0.5},
        {"min_p": 0.2},
        {"temperature": 0.0, "top_k": 3},
    ],
)
@pytest.mark.parametrize(("vocab_size", "max_candidates"), [(63, 64), (700, 16), (700, 512)])
def test_sample(
    settings: dict[str, float],
    vocab_size: int,
    max_candidates: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampling, "_BLOCK", 512)  # several blocks a row
    monkeypatch.setattr(sampling, "_MAX_CANDIDATES", max_candidates)  # few don't reach far enough for every setting
    logits = torch.randn(4, vocab_size + 5, device=device)[:, 5:] * 3  # rows apart
    arguments = _arguments(4, device, **settings)
    assert torch.equal(sample_triton(logits, *arguments)[0], reference.sample(logits, *arguments))


def test_sample_of_half_precision_with_equal_and_forbidden_logits(device: torch.device) -> None:
    logits = torch.randint(-3, 3, (4, 200), device=device).to(torch.float16)
    logits[:, ::3] = -torch.inf
    arguments = _arguments(4, device, top_k=30, top_p=0.9)
    ids, _is_finite = sample_triton(logits, *arguments)
    assert torch.equal(ids, reference.sample(logits, *arguments))
    assert torch.all(ids % 3 != 0)


def test_sample_of_nan_stays_within_the_vocabulary(device: torch.device) -> None:
    logits = torch.full((2, 100), torch.nan, device=device)
    ids, is_finite = sample_triton(logits, *_arguments(2, device, top_p=0.5))
    assert not is_finite.any()
    assert torch.all((ids >= 0) & (ids < 100))


def test_sample_at_hardly_any_temperature_is_greedy(device: torch.device) -> None:
    """Logits that are divided by it would be infinite."""
    logits = torch.randn(4, 300, device=device) * 10
    arguments = list(_arguments(4, device, top_p=0.9))
    arguments[0] = torch.tensor([1e-5, 9e-6, 1e-38, 1e-40], device=device)
    for sample in (sample_triton, sample_checked):
        ids, is_finite = sample(logits, *arguments)
        assert is_finite.all() and torch.equal(ids, greedy(logits))


def test_sample_mixes_greedy_and_drawn_rows(device: torch.device) -> None:
    logits = torch.randn(4, 300, device=device)
    arguments = list(_arguments(4, device))
    arguments[0] = torch.tensor([0.0, 1.0, 0.0, 0.5], device=device)
    assert torch.equal(sample_triton(logits, *arguments)[0], reference.sample(logits, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_greedy_takes_the_first_of_the_largest_logits(
    dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_BLOCK", 128)
    logits = torch.randint(-9, 9, (7, 512), device=device).to(dtype)[:, 5:]
    expected = [row.index(max(row)) for row in logits.tolist()]
    for choose in (greedy_triton, greedy_checked):
        ids, is_finite = choose(logits)
        assert ids.tolist() == expected
        assert is_finite.all()
    assert greedy(logits).tolist() == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_unsound_rows_are_named(value: float, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_BLOCK", 128)
    logits = torch.randn(3, 300, device=device, dtype=torch.float16)
    logits[1, 299] = value
    arguments = _arguments(3, device, top_k=3)
    results = [greedy_triton(logits), greedy_checked(logits)]
    results += [sample_triton(logits, *arguments), sample_checked(logits, *arguments)]
    for ids, is_finite in results:
        assert is_finite.tolist() == [True, False, True]
        assert torch.all((ids >= 0) & (ids < 300))
