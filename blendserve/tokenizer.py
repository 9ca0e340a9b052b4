"""From requests to token ids: chat template, tokenizer, and the checks that only token counts allow.

Every request leaves either as a tokenized request or as a rejected one with its reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq

from blendserve.errors import ModelError, UsageError
from blendserve.job_folder import JobFolder
from blendserve.manifest import replacing
from blendserve.models.config import ModelConfig
from blendserve.schemas import REJECTED_REQUESTS, TOKENIZED_REQUESTS
from blendserve.spec import JobSpec

_BATCH_ROWS = 1024

Message = dict[str, str]
Conversation = list[Message]


class RejectedRequest(Exception):  # noqa: N818 - a row's outcome, not a failure of the job
    """This request can't run; the text is the reason that its row gets."""


@dataclass(frozen=True, slots=True)
class PromptTokenizer:
    """One model's way from a prompt to token ids.

    `vocab_size` counts the rows of the embedding; `max_model_len` is prompt plus completion, in tokens.
    """

    tokenizer: Any
    vocab_size: int
    max_model_len: int
    spec: JobSpec

    @classmethod
    def load(cls, model_folder: Path, spec: JobSpec) -> PromptTokenizer:
        """Raises ModelError for a folder without usable tokenizer, UsageError for a max_model_len beyond the model."""
        config = ModelConfig.load(model_folder)
        context = config.max_position_embeddings
        if spec.max_model_len is not None and spec.max_model_len > context:
            raise UsageError(
                f"Option 'max_model_len': the model's context is {context} tokens, got {spec.max_model_len}. "
                "Ask for less, or leave it out."
            )
        try:
            tokenizer = _load(model_folder)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(
                f"Model {spec.model} has no usable tokenizer in {model_folder}: {error}. Expected tokenizer.json and "
                "tokenizer_config.json beside the weights."
            ) from error
        return cls(tokenizer, config.vocab_size, spec.max_model_len or context, spec)

    @property
    def has_chat_template(self) -> bool:
        return not self.spec.raw and getattr(self.tokenizer, "chat_template", None) is not None

    def tokenize(self, requests: pa.RecordBatch) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        """Split a batch in REQUESTS' schema into TOKENIZED_REQUESTS and REJECTED_REQUESTS."""
        rows = requests.to_pylist()
        tokenized, rejected = [], []
        for row, prompt in zip(rows, self._prompts(rows), strict=True):
            try:
                if isinstance(prompt, RejectedRequest):
                    raise prompt
                tokenized.append(self._fit(row, prompt))
            except RejectedRequest as reason:
                key = {"row_index": row["row_index"], "request_id": row["request_id"]}
                rejected.append({**key, "error": str(reason)})
        return (
            pa.RecordBatch.from_pylist(tokenized, schema=TOKENIZED_REQUESTS),
            pa.RecordBatch.from_pylist(rejected, schema=REJECTED_REQUESTS),
        )

    def _prompts(self, rows: list[dict[str, Any]]) -> list[list[int] | RejectedRequest]:
        """Token ids a row; the texts of a batch go through the tokenizer in one call."""
        prompts: list[list[int] | RejectedRequest] = []
        texts: list[str] = []
        positions: list[int] = []
        for position, row in enumerate(rows):
            prompts.append([])
            try:
                if row["error"] is not None:
                    raise RejectedRequest(row["error"])
                if row["prompt_token_ids"] is not None:
                    prompts[position] = self._check_token_ids(row["prompt_token_ids"])
                else:
                    texts.append(self._render(row["prompt"], row["messages"]))
                    positions.append(position)
            except RejectedRequest as reason:
                prompts[position] = reason
        for position, ids in zip(positions, self._encode(texts), strict=True):
            prompts[position] = ids
        return prompts

    def _check_token_ids(self, ids: list[int]) -> list[int]:
        largest = max(ids)
        if largest >= self.vocab_size:
            raise RejectedRequest(
                f"prompt_token_ids[{ids.index(largest)}] is {largest}, outside the vocabulary of {self.vocab_size}"
            )
        return ids

    def _render(self, prompt: str | None, messages: Conversation | None) -> str:
        if not self.has_chat_template:
            if messages is not None:
                raise RejectedRequest("chat messages need a chat template; the model has none, or --raw turned it off")
            return f"{self.spec.system}\n\n{prompt}" if self.spec.system else str(prompt)
        conversation = messages if messages is not None else [{"role": "user", "content": str(prompt)}]
        if self.spec.system and conversation[0]["role"] != "system":
            conversation = [{"role": "system", "content": self.spec.system}, *conversation]
        try:
            text: str = self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise RejectedRequest(f"the model's chat template refuses the messages: {error}") from error
        return text

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """A chat template writes its special tokens itself; plain text gets those that the tokenizer adds."""
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=not self.has_chat_template)["input_ids"]
        return ids

    def _fit(self, row: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        max_tokens = row["max_tokens"] or self.spec.max_tokens
        if len(ids) >= self.max_model_len:
            if not self.spec.truncate_prompt:
                raise RejectedRequest(
                    f"the prompt has {len(ids)} tokens; with at least one for the completion the context of "
                    f"{self.max_model_len} is exceeded (--truncate-prompt cuts it)"
                )
            ids = self._truncate(row, ids, max(self.max_model_len - max_tokens, self.max_model_len // 2))
        if not ids:
            raise RejectedRequest("the prompt is empty: it has no tokens")
        return {
            "row_index": row["row_index"],
            "request_id": row["request_id"],
            "prompt_token_ids": ids,
            "num_prompt_tokens": len(ids),
            "max_tokens": min(max_tokens, self.max_model_len - len(ids)),
            "output_tokens_hint": row["output_tokens_hint"],
        }

    def _truncate(self, row: dict[str, Any], ids: list[int], limit: int) -> list[int]:
        """Cut the end of the prompt's last text so that the whole fits `limit` and its chat template stays whole."""
        if row["prompt_token_ids"] is not None:
            return ids[:limit]
        messages = row["messages"]
        text = messages[-1]["content"] if messages is not None else row["prompt"]
        kept: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        while len(ids) > limit:
            kept = kept[: max(len(kept) - (len(ids) - limit), 0)]
            if not kept:
                raise RejectedRequest(f"the prompt can't be cut to {limit} tokens: what surrounds its text is longer")
            shorter = self.tokenizer.decode(kept)
            last = None if messages is None else [*messages[:-1], {**messages[-1], "content": shorter}]
            ids = self._encode([self._render(shorter, last)])[0]
        return ids


def tokenize_requests(folder: JobFolder, tokenizer: PromptTokenizer) -> dict[str, int]:
    """Write `tokenized_requests` and `rejected_requests` from `requests`. Returns how many of each."""
    num_tokenized, num_rejected, num_tokens = 0, 0, 0
    with (
        pq.ParquetFile(folder.relation("requests")) as requests,
        replacing(folder.relation("rejected_requests")) as rejected_path,
        replacing(folder.relation("tokenized_requests")) as tokenized_path,
        pq.ParquetWriter(rejected_path, REJECTED_REQUESTS) as rejected_writer,
        # Token ids hardly repeat in a way that a dictionary catches: building one costs five times the rest.
        pq.ParquetWriter(tokenized_path, TOKENIZED_REQUESTS, use_dictionary=False) as tokenized_writer,
    ):
        for batch in requests.iter_batches(batch_size=_BATCH_ROWS):
            tokenized, rejected = tokenizer.tokenize(batch)
            tokenized_writer.write_batch(tokenized)
            rejected_writer.write_batch(rejected)
            num_tokenized += tokenized.num_rows
            num_rejected += rejected.num_rows
            num_tokens += sum(tokenized.column("num_prompt_tokens").to_pylist())
    return {"num_requests": num_tokenized, "num_rejected": num_rejected, "num_prompt_tokens": num_tokens}


def _load(model_folder: Path) -> Any:
    """Where the tokenizer's class is stated, transformers asks the model's config for names only: the base class of all
    configs will do for that, and spares the seconds of imports that the model's own costs."""
    from transformers import AutoTokenizer, PreTrainedConfig  # costs seconds: only where it's used

    def read(name: str) -> dict[str, Any]:
        path = model_folder / name
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found

    stated, config = read("tokenizer_config.json"), None
    if stated.get("tokenizer_class") and "auto_map" not in stated:
        config = PreTrainedConfig.from_dict({**read("config.json"), "_name_or_path": str(model_folder)})
    return AutoTokenizer.from_pretrained(str(model_folder), config=config, trust_remote_code=False)
