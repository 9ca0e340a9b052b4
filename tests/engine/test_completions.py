"""How completions end: stop strings, token limits, prompts that can't run, models that give NaN."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from blendserve.engine.detokenizer import Detokenizer, GrowingText
from blendserve.engine.request import FinishReason
from blendserve.errors import UsageError
from blendserve.models.llama import LlamaModel
from blendserve.spec import SamplingSpec
from tests.engine.engine_runs import generate, make_engine, make_prompts, run_engine, save_tiny_model, stated_requests

PROMPTS = make_prompts(6)
END_OF_NOTHING = 9999


@pytest.fixture(scope="module")
def ascii_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that generates letters a to h only, one a token, so that any three of them are a good stop string."""
    folder = save_tiny_model(tmp_path_factory.mktemp("ascii"), seed=5)
    head = load_file(folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    letters = {tokenizer.token_to_id(letter) for letter in "abcdefgh"}
    weight = head["lm_head.weight"]
    for token in range(len(weight)):
        if token not in letters:
            weight[token] = 0.0  # a logit of 0; of eight random ones some are above
    save_file(head, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def texts(ascii_model: Path) -> list[str]:
    run = run_engine(make_engine(ascii_model), stated_requests(PROMPTS, 30))
    texts = [run.completions[row].text or "" for row in range(len(PROMPTS))]
    assert all(len(text) == 30 and text.isascii() for text in texts)
    return texts


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_stop_string_across_tokens_ends_and_cuts(ascii_model: Path, texts: list[str], max_in_flight: int) -> None:
    stop = texts[0][10:13]
    engine = make_engine(ascii_model, SamplingSpec(stop=(stop, "never this")), max_in_flight)
    run = run_engine(engine, stated_requests(PROMPTS, 30))
    assert any(stop not in text for text in texts) or len(set(texts)) == 1
    for row, text in enumerate(texts):
        completion, found = run.completions[row], text.find(stop)
        if found < 0:
            assert (completion.text, completion.finish_reason) == (text, FinishReason.LENGTH)
        else:
            assert (completion.text, completion.finish_reason) == (text[:found], FinishReason.STOP)
            assert len(completion.token_ids) == found + len(stop)


def test_the_first_of_several_stop_strings_counts(ascii_model: Path, texts: list[str]) -> None:
    late, early = texts[0][12:15], texts[0][6:9]
    sampling = SamplingSpec(stop=(late, early))
    run = run_engine(make_engine(ascii_model, sampling), stated_requests(PROMPTS[:1], 30))
    assert run.completions[0].text == texts[0][: min(texts[0].find(late), texts[0].find(early))]


def test_max_tokens_is_each_requests_own(llama: Path) -> None:
    requests = stated_requests(PROMPTS, 9)
    for number, stated in enumerate(requests, start=1):
        stated["max_tokens"] = number
    run = run_engine(make_engine(llama), requests)
    assert [len(tokens) for tokens in run.token_ids()] == [1, 2, 3, 4, 5, 6]
    assert {completion.finish_reason for completion in run.completions.values()} == {FinishReason.LENGTH}


def test_a_text_of_many_bytes_a_character_grows_only_by_whole_ones(llama: Path) -> None:
    text = "Grüße, 世界 🌍!"
    tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
    token_ids = tokenizer.encode(text).ids
    growing = GrowingText(Detokenizer(llama, ("界",)))
    cut = [growing.append(token_id) for token_id in token_ids]
    first = next(number for number, found in enumerate(cut) if found is not None)
    assert cut[first] == "Grüße, 世"
    assert first + 1 == len("Grüße, 世界".encode())


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_the_end_token_ends_unless_ignored(llama: Path, tmp_path: Path, max_in_flight: int) -> None:
    greedy = generate(llama, PROMPTS[:1], 14)[0]
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END_OF_NOTHING, greedy[5]]}))
    ended = run_engine(make_engine(folder, None, max_in_flight), stated_requests(PROMPTS[:1], 14)).completions[0]
    ignored = run_engine(make_engine(folder, SamplingSpec(ignore_eos=True)), stated_requests(PROMPTS[:1], 14))
    end = greedy.index(greedy[5])
    assert list(ended.token_ids) == greedy[: end + 1]
    assert ended.finish_reason is FinishReason.STOP
    assert ended.text == Detokenizer(llama, ()).decode(greedy[:end])
    assert list(ignored.completions[0].token_ids) == greedy
    assert ignored.completions[0].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("length", "spec", "expected"),
    [
        (256, {}, "the prompt has 256 tokens; with at least one for the completion the context of 256 tokens"),
        (50, {"max_model_len": 50}, "the context of 50 tokens is exceeded"),
        (65, {"num_blocks": 8}, "the prompt has 65 tokens; the KV cache holds 64"),
        (0, {}, "the prompt is empty"),
    ],
)
def test_a_prompt_that_cannot_run_fails_alone(llama: Path, length: int, spec: dict[str, int], expected: str) -> None:
    good = PROMPTS[0][:20]
    requests = stated_requests([good, [7] * length, good], 5)
    run = run_engine(make_engine(llama, **spec), requests)
    failed = run.completions[1]
    assert failed.finish_reason is FinishReason.ERROR and failed.text is None and failed.token_ids == ()
    assert expected in (failed.error or "")
    assert run.completions[0].token_ids == run.completions[2].token_ids
    assert len(run.completions[0].token_ids) == 5


def test_a_completion_that_outgrows_the_whole_cache_fails_with_the_sizes(llama: Path) -> None:
    run = run_engine(make_engine(llama, num_blocks=3), stated_requests([[1] * 20, [2] * 3], 9))
    assert "reached 25 tokens; the KV cache holds 24" in (run.completions[0].error or "")
    assert len(run.completions[1].token_ids) == 9


def test_the_context_limit_ends_a_completion(llama: Path) -> None:
    run = run_engine(make_engine(llama, max_model_len=32), stated_requests([[1] * 30], 100))
    assert len(run.completions[0].token_ids) == 2
    assert run.completions[0].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_logits_that_are_not_finite_fail_their_requests_only(llama: Path, tmp_path: Path, max_in_flight: int) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    poison = 3
    tensors["model.embed_tokens.weight"][poison] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    clean = [[token for token in prompt if token != poison] for prompt in make_prompts(8)]
    poisoned = [[*prompt[:30], poison, *prompt[30:]] for prompt in clean]
    prompts = [prompt for pair in zip(clean, poisoned, strict=True) for prompt in pair]
    expected = run_engine(make_engine(llama), stated_requests(clean, 6)).token_ids()
    # Few blocks, so that those of failed requests are used again at once.
    engine = make_engine(folder, None, max_in_flight, num_blocks=30, max_num_seqs=4)
    run = run_engine(engine, stated_requests(prompts, 6))
    good = [row for row in range(0, 16, 2) if poison not in expected[row // 2]]
    assert len(good) > 4
    for row in good:
        assert list(run.completions[row].token_ids) == expected[row // 2]
    for row in range(1, 16, 2):
        assert "not finite" in (run.completions[row].error or "")
        assert run.completions[row].finish_reason is FinishReason.ERROR


def test_a_run_that_is_stopped_leaves_the_engine_ready_for_the_next(llama: Path) -> None:
    engine = make_engine(llama, max_num_seqs=2)
    requests = stated_requests(PROMPTS, 8)
    asked = iter(range(100))
    stopped = run_engine(engine, requests, should_stop=lambda: next(asked) > 10)
    assert 0 < len(stopped.completions) < len(PROMPTS)
    assert run_engine(engine, requests).token_ids() == run_engine(make_engine(llama), requests).token_ids()


def fail_for_memory(kind: int) -> None:
    """As torch does when a tensor finds no memory, a library's workspace, or something while a graph is captured."""
    if kind == 1:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    try:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")
    finally:
        if kind == 2:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_a_step_without_memory_shrinks_the_cache_and_goes_on(
    llama: Path, monkeypatch: pytest.MonkeyPatch, max_in_flight: int
) -> None:
    requests = stated_requests(PROMPTS, 12)
    expected = run_engine(make_engine(llama), requests).token_ids()
    engine = make_engine(llama, None, max_in_flight, num_blocks=100, max_num_seqs=4)
    forward, numbers, kinds = LlamaModel.forward, iter(range(1000)), iter(range(3))

    def forward_without_memory(*arguments: Any) -> Any:
        if next(numbers) in (0, 3, 9):
            fail_for_memory(next(kinds))
        return forward(*arguments)

    monkeypatch.setattr(LlamaModel, "forward", forward_without_memory)
    run = run_engine(engine, requests)
    assert run.token_ids() == expected
    assert run.steps[-1].num_total_blocks == 72  # 100, three times less a tenth


def test_what_is_no_lack_of_memory_is_raised(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(LlamaModel, "forward", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_engine(make_engine(llama), stated_requests(PROMPTS, 12))


def test_a_device_that_never_has_memory_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward_without_memory(*_arguments: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(LlamaModel, "forward", forward_without_memory)
    with pytest.raises(UsageError, match=r"after 5 reductions\. Lower max_num_batched_tokens \(\d+\)"):
        run_engine(make_engine(llama), stated_requests(PROMPTS, 12))
