"""From requests to token ids on a tokenizer of one token a byte, so that every count can be read off the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from blendserve.errors import ModelError, UsageError
from blendserve.schemas import REQUESTS
from blendserve.spec import load_job
from blendserve.tokenizer import PromptTokenizer

CONTEXT = 256


def tokenize(model: Path, request: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What becomes of one request: a tokenized row with its prompt as text, or a rejected one."""
    tokenizer = PromptTokenizer.load(model, load_job(None, {"input": "i", "output": "o", **options}))
    batch = pa.RecordBatch.from_pylist([{"row_index": 3, "request_id": "r", **request}], schema=REQUESTS)
    tokenized, rejected = tokenizer.tokenize(batch)
    assert tokenized.num_rows + rejected.num_rows == 1
    rows: list[dict[str, Any]] = tokenized.to_pylist() + rejected.to_pylist()
    assert (rows[0]["row_index"], rows[0]["request_id"]) == (3, "r")
    if tokenized.num_rows:
        assert rows[0]["num_prompt_tokens"] == len(rows[0]["prompt_token_ids"])
        rows[0]["text"] = tokenizer.tokenizer.decode(rows[0]["prompt_token_ids"])
    return rows[0]


def test_chat_template_wraps_the_prompt(tiny_chat_model: Path) -> None:
    assert tokenize(tiny_chat_model, {"prompt": "hi"})["text"] == "<user>hi</><assistant>"


def test_system_prompt_comes_first(tiny_chat_model: Path) -> None:
    row = tokenize(tiny_chat_model, {"prompt": "hi"}, system="Be brief.")
    assert row["text"] == "<system>Be brief.</><user>hi</><assistant>"


def test_messages_keep_their_own_system_prompt(tiny_chat_model: Path) -> None:
    messages = [{"role": "system", "content": "Own."}, {"role": "user", "content": "hi"}]
    row = tokenize(tiny_chat_model, {"messages": messages}, system="Be brief.")
    assert row["text"] == "<system>Own.</><user>hi</><assistant>"


def test_raw_leaves_the_template_out(tiny_chat_model: Path) -> None:
    assert tokenize(tiny_chat_model, {"prompt": "hi"}, raw=True)["text"] == "hi"
    assert tokenize(tiny_chat_model, {"prompt": "hi"}, raw=True, system="S")["text"] == "S\n\nhi"


def test_a_model_without_template_takes_plain_text(tiny_model: Path) -> None:
    assert tokenize(tiny_model, {"prompt": "hi"})["text"] == "hi"


def test_messages_without_template_are_rejected(tiny_model: Path) -> None:
    row = tokenize(tiny_model, {"messages": [{"role": "user", "content": "hi"}]})
    assert "need a chat template" in row["error"]


def test_messages_that_the_template_refuses_are_rejected(tiny_chat_model: Path) -> None:
    row = tokenize(tiny_chat_model, {"messages": [{"role": "wizard", "content": "hi"}]})
    assert "unknown role" in row["error"]


def test_one_bad_row_leaves_its_neighbours_alone(tiny_chat_model: Path) -> None:
    tokenizer = PromptTokenizer.load(tiny_chat_model, load_job(None, {"input": "i", "output": "o"}))
    requests = [
        {"row_index": 0, "request_id": "a", "prompt": "x"},
        {"row_index": 1, "request_id": "b", "error": "the prompt is null"},
        {"row_index": 2, "request_id": "c", "prompt_token_ids": [1, 2]},
    ]
    tokenized, rejected = tokenizer.tokenize(pa.RecordBatch.from_pylist(requests, schema=REQUESTS))
    assert tokenized.column("row_index").to_pylist() == [0, 2]
    assert rejected.to_pylist() == [{"row_index": 1, "request_id": "b", "error": "the prompt is null"}]


def test_token_ids_are_taken_as_they_are(tiny_chat_model: Path) -> None:
    assert tokenize(tiny_chat_model, {"prompt_token_ids": [9, 256]})["prompt_token_ids"] == [9, 256]


def test_token_ids_outside_the_vocabulary_are_rejected(tiny_model: Path) -> None:
    row = tokenize(tiny_model, {"prompt_token_ids": [0, 257]})
    assert row["error"] == "prompt_token_ids[1] is 257, outside the vocabulary of 257"


@pytest.mark.parametrize(("length", "is_rejected"), [(CONTEXT - 1, False), (CONTEXT, True), (CONTEXT + 40, True)])
def test_over_long_prompts_are_rejected(tiny_model: Path, length: int, is_rejected: bool) -> None:
    row = tokenize(tiny_model, {"prompt": "x" * length})
    assert ("error" in row) is is_rejected
    if is_rejected:
        assert f"{length} tokens" in row["error"]
    else:
        assert row["max_tokens"] == 1  # what the context leaves


def test_max_model_len_narrows_the_context(tiny_model: Path) -> None:
    assert "error" in tokenize(tiny_model, {"prompt": "x" * 40}, max_model_len=40)
    with pytest.raises(UsageError, match="the model's context is 256 tokens, got 512"):
        tokenize(tiny_model, {"prompt": "x"}, max_model_len=512)


def test_truncation_cuts_the_end_and_keeps_the_template(tiny_chat_model: Path) -> None:
    text = "".join(chr(97 + number % 26) for number in range(400))
    row = tokenize(tiny_chat_model, {"prompt": text}, truncate_prompt=True, max_tokens=56)
    assert row["num_prompt_tokens"] == CONTEXT - 56
    assert row["text"].startswith("<user>abc")
    assert row["text"].endswith("</><assistant>")
    assert row["max_tokens"] == 56


def test_truncation_leaves_half_of_the_context_to_the_prompt(tiny_model: Path) -> None:
    row = tokenize(tiny_model, {"prompt_token_ids": [5] * 400}, truncate_prompt=True, max_tokens=10_000)
    assert (row["num_prompt_tokens"], row["max_tokens"]) == (128, 128)


def test_truncation_has_its_limits(tiny_chat_model: Path) -> None:
    messages = [{"role": "user", "content": "y" * 400}, {"role": "assistant", "content": "no"}]
    assert "can't be cut" in tokenize(tiny_chat_model, {"messages": messages}, truncate_prompt=True)["error"]


def test_own_max_tokens_overrides_the_job(tiny_model: Path) -> None:
    assert tokenize(tiny_model, {"prompt": "x", "max_tokens": 7}, max_tokens=9)["max_tokens"] == 7
    assert tokenize(tiny_model, {"prompt": "x"}, max_tokens=9)["max_tokens"] == 9


def test_a_folder_without_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    with pytest.raises(ModelError, match="has no usable tokenizer"):
        tokenize(tmp_path, {"prompt": "x"})
