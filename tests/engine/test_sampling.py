"""Seeded sampling: the same request gives the same tokens in any batch, and tokens come as often as they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from blendserve.engine.sampler import Sampler, request_seed
from blendserve.spec import SamplingSpec
from tests.engine.engine_runs import make_engine, make_prompts, run_engine, stated_requests

PROMPTS = make_prompts(10)


def test_tokens_depend_on_the_seed_and_on_nothing_else(llama: Path) -> None:
    sampling = SamplingSpec(temperature=0.9, top_p=0.95, seed=3)
    requests = stated_requests(make_prompts(10, num_prefixes=1, longest=12), 30)
    together = run_engine(make_engine(llama, sampling), requests)
    alone = run_engine(make_engine(llama, sampling, max_num_seqs=1, prefix_cache=False), requests[::-1])
    preempting = make_engine(llama, sampling, block_size=4, num_blocks=24, max_num_batched_tokens=70)
    preempted = run_engine(preempting, [{**stated, "estimated_output_tokens": 1} for stated in requests])
    assert preempted.total("num_preempted") > 0
    assert together.token_ids() == alone.token_ids() == preempted.token_ids()


def test_requests_differ_and_seeds_differ() -> None:
    seeds = {request_seed(job_seed, f"request-{number}") for job_seed in range(3) for number in range(1000)}
    assert len(seeds) == 3000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(0, "a") == 1681515707904281929


def test_a_top_k_of_one_is_greedy(llama: Path) -> None:
    requests = stated_requests(PROMPTS, 12)
    greedy = run_engine(make_engine(llama), requests)
    top_one = run_engine(make_engine(llama, SamplingSpec(temperature=1.3, top_k=1)), requests)
    assert top_one.token_ids() == greedy.token_ids()


def test_hardly_any_temperature_is_greedy() -> None:
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)) * 10
    numbers = torch.arange(8)
    ids, is_finite = Sampler(SamplingSpec(temperature=1e-40), torch.device("cpu"))(logits, numbers, numbers)
    assert is_finite.all() and torch.equal(ids, logits.argmax(dim=-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_first_tokens_follow_the_models_distribution(llama: Path, temperature: float) -> None:
    num_requests, prompt = 3000, PROMPTS[1]
    sampling = SamplingSpec(temperature=temperature)
    engine = make_engine(llama, sampling, max_num_seqs=256, num_blocks=1024)
    run = run_engine(engine, stated_requests([prompt] * num_requests, 1))
    observed = np.bincount([tokens[0] for tokens in run.token_ids()], minlength=257)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    expected = torch.softmax(logits.double() / temperature, dim=-1).numpy() * num_requests
    rare = expected < 5
    observed_bins = np.append(observed[~rare], observed[rare].sum())
    expected_bins = np.append(expected[~rare], expected[rare].sum())
    statistic = ((observed_bins - expected_bins) ** 2 / expected_bins).sum()
    degrees = len(expected_bins) - 1
    assert degrees > 5
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)  # about four standard deviations; the seed is fixed


def test_top_k_and_top_p_leave_unlikely_tokens_out(llama: Path) -> None:
    prompt = PROMPTS[1]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.inference_mode():
        probabilities = torch.softmax(model(torch.tensor([prompt])).logits[0, -1], dim=-1)
    order = probabilities.argsort(descending=True)
    nucleus = int((probabilities[order].cumsum(0) < 0.5).sum()) + 1
    for sampling, kept in (
        (SamplingSpec(temperature=1.0, top_k=3), order[:3]),
        (SamplingSpec(temperature=1.0, top_p=0.5), order[:nucleus]),
    ):
        run = run_engine(make_engine(llama, sampling, max_num_seqs=256), stated_requests([prompt] * 300, 1))
        assert {tokens[0] for tokens in run.token_ids()} == set(kept.tolist())
