"""The real model: its conversion, and its greedy tokens against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from blendserve.engine.detokenizer import Detokenizer
from blendserve.models.config import ModelConfig
from blendserve.models.source import resolve_model
from tests.engine.engine_runs import generate, make_engine, run_engine, stated_requests

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about the sea.",
    "Antworte auf Deutsch: wie heißt du? 😀",
)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return resolve_model("smollm2")


def test_its_folder_is_complete_and_made_once(smollm2: Path) -> None:
    assert ModelConfig.load(smollm2).eos_token_ids == (2,)
    assert resolve_model("smollm2") == smollm2
    assert "quantization_config" not in (smollm2 / "config.json").read_text()
    assert AutoTokenizer.from_pretrained(smollm2).chat_template


def test_its_greedy_tokens_and_texts_are_those_of_transformers(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in QUESTIONS
    ]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    engine = make_engine(smollm2, block_size=16, max_num_batched_tokens=64)
    run = run_engine(engine, stated_requests(prompts, 16))
    expected = generate(smollm2, prompts, 16)
    assert run.token_ids() == expected
    assert run.total("num_cached_tokens") > 0
    for row, token_ids in enumerate(expected):
        assert run.completions[row].text == tokenizer.decode(token_ids, skip_special_tokens=True)
    assert run.completions[0].text == "The capital of France is Paris."


def test_any_text_comes_back_from_its_tokens(smollm2: Path) -> None:
    tokenizer, detokenizer = AutoTokenizer.from_pretrained(smollm2), Detokenizer(smollm2, ())
    for text in (*QUESTIONS, "  two  spaces , and 'quotes' .\n\ttab", "e\u0301 漢字"):
        assert detokenizer.decode(tokenizer(text)["input_ids"]) == text
