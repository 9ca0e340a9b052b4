"""Small jobs on disk for the planner's tests: tokenized requests and completions as the other steps write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blendserve.job_folder import JobFolder
from blendserve.schemas import COMPLETIONS, TOKENIZED_REQUESTS
from blendserve.spec import JobSpec

CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 1000,
}


def write_model(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


def write_job(
    root: Path,
    prompts: list[list[int]],
    *,
    max_tokens: int | list[int] = 64,
    hints: list[int | None] | None = None,
) -> JobFolder:
    folder = JobFolder(root)
    folder.work.mkdir(parents=True, exist_ok=True)
    count = len(prompts)
    table = pa.table(
        {
            "row_index": list(range(count)),
            "request_id": [f"request-{row}" for row in range(count)],
            "prompt_token_ids": prompts,
            "num_prompt_tokens": [len(prompt) for prompt in prompts],
            "max_tokens": [max_tokens] * count if isinstance(max_tokens, int) else max_tokens,
            "output_tokens_hint": hints if hints is not None else [None] * count,
        },
        schema=TOKENIZED_REQUESTS,
    )
    pq.write_table(table, folder.relation("tokenized_requests"))
    return folder


def write_completions(folder: JobFolder, shard: str, rows: dict[int, tuple[int, str]]) -> None:
    """`rows`: row_index → (number of completion tokens, finish_reason)."""
    path = folder.completions / shard / "part-00000.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[Any]] = {name: [] for name in COMPLETIONS.names}
    for row, (num_tokens, finish_reason) in rows.items():
        is_error = finish_reason == "error"
        columns["row_index"].append(row)
        columns["request_id"].append(f"request-{row}")
        columns["completion"].append(None if is_error else "text")
        columns["completion_token_ids"].append([7] * num_tokens)
        columns["finish_reason"].append(finish_reason)
        columns["error"].append("it failed" if is_error else None)
        columns["num_prompt_tokens"].append(1)
        columns["num_cached_tokens"].append(0)
        columns["num_completion_tokens"].append(num_tokens)
    pq.write_table(pa.table(columns, schema=COMPLETIONS), path)


def make_spec(folder: JobFolder, **settings: Any) -> JobSpec:
    defaults: dict[str, Any] = {"input": "requests.parquet", "output": str(folder.root), "hardware": "cpu"}
    return JobSpec(**{**defaults, **settings})


def scheduled_rows(folder: JobFolder, shards: tuple[Any, ...]) -> list[list[dict[str, Any]]]:
    """The rows of each shard file of the plan."""
    return [pq.read_table(folder.plan / shard.file).to_pylist() for shard in shards]
