"""The demo's rows on the demo's model: every completion is what transformers generates greedily in float32."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from blendserve import demo_data, job
from blendserve.job_folder import JobFolder
from blendserve.models.source import resolve_model
from blendserve.spec import JobSpec
from tests.end_to_end.command_line import results

MIN_SHARED_TOKENS = 16
NUM_THREADS = len(os.sched_getaffinity(0))

pytestmark = pytest.mark.timeout(900)  # a real model on a CPU


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the demo's job."""
    folder = tmp_path_factory.mktemp("demo")
    demo_data.write(folder / "requests.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(NUM_THREADS))
        job.run(JobSpec(input=str(folder / "requests.parquet"), output=str(folder / "job"), id_column="id"))
    return folder / "job"


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    yield AutoModelForCausalLM.from_pretrained(resolve_model("smollm2"), dtype=torch.float32).eval()
    torch.set_num_threads(num_threads)


def completed(demo: Path) -> Iterator[tuple[list[int], list[int], int]]:
    """Prompt, completion and max_tokens of every request that ran, sorted by prompt so that neighbours share most."""
    folder = JobFolder(demo)
    tokenized = pq.read_table(folder.relation("tokenized_requests")).to_pylist()
    requests = {row["row_index"]: row for row in tokenized}
    files = sorted(folder.completions.rglob("part-*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    for row in sorted(rows, key=lambda row: requests[row["row_index"]]["prompt_token_ids"]):
        request = requests[row["row_index"]]
        yield request["prompt_token_ids"], row["completion_token_ids"], request["max_tokens"]


def common_length(left: list[int], right: list[int]) -> int:
    pairs = zip(left, right, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


@torch.inference_mode()
def test_every_token_is_the_one_that_transformers_finds_likeliest(demo: Path, model: Any) -> None:
    """A completion is greedy exactly when each of its tokens is the likeliest after all before it."""
    eos = model.config.eos_token_id
    rows = list(completed(demo))
    num_checked = 0
    shared, cache = rows[0][0][:0], DynamicCache()
    for (prompt, completion, max_tokens), following in zip(rows, [*rows[1:], ([], [], 0)], strict=True):
        if prompt[: len(shared)] != shared:
            shared, cache = [], DynamicCache()
        num_common = min(common_length(prompt, following[0]), len(prompt) - 1)
        if num_common >= len(shared) + MIN_SHARED_TOKENS:  # compute what the next ones share once
            shared_ids = torch.tensor([prompt[len(shared) : num_common]])
            cache = model(shared_ids, past_key_values=copy.deepcopy(cache), use_cache=True).past_key_values
            shared = prompt[:num_common]
        ids = torch.tensor([[*prompt[len(shared) :], *completion[:-1]]])
        logits = model(ids, past_key_values=copy.deepcopy(cache), logits_to_keep=len(completion)).logits
        assert logits[0].argmax(dim=-1).tolist() == completion
        assert eos not in completion[:-1]
        assert completion[-1] == eos or len(completion) == max_tokens
        num_checked += 1
    assert num_checked > 200


@torch.inference_mode()
def test_generate_itself_agrees(demo: Path, model: Any) -> None:
    rows = list(completed(demo))
    for prompt, completion, max_tokens in rows[:: len(rows) // 5]:
        generated = model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)
        assert generated[0, len(prompt) :].tolist() == completion


def test_the_text_is_the_decoded_completion(demo: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("smollm2"))
    files = sorted(JobFolder(demo).completions.rglob("part-*.parquet"))
    for file in files:
        for row in pq.read_table(file).to_pylist():
            assert row["completion"] == tokenizer.decode(row["completion_token_ids"], skip_special_tokens=True)


def test_the_prefix_was_shared_and_the_plan_says_so(demo: Path) -> None:
    rows = results(demo)
    assert len(rows) == demo_data.DEFAULT_ROWS
    classified = [row for row in rows if row["kind"] == "classify"]
    assert sum(row["num_cached_tokens"] for row in classified) > 0.8 * sum(
        row["num_prompt_tokens"] for row in classified
    )
    summary = job.show(demo, 1)["manifest"]["plan"]
    assert summary["density_left"] > summary["density_right"]
    assert summary["prefix_sharing"] >= 0.99 * summary["prefix_sharing_optimal"]
