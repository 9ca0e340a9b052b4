"""Prompts are streamed: what a shard takes of the host's memory doesn't grow with its prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blendserve.engine import shard_reader
from blendserve.engine.shard_reader import ShardReader
from blendserve.schemas import SCHEDULED_REQUESTS

NUM_REQUESTS, ROW_GROUP, PROMPT_TOKENS = 4000, 100, 2000


def test_a_shard_is_never_in_memory_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "_MAX_KEPT_TOKENS", 4 * ROW_GROUP * PROMPT_TOKENS)
    tokens = np.arange(NUM_REQUESTS * PROMPT_TOKENS, dtype=np.int32)
    offsets = np.arange(0, len(tokens) + 1, PROMPT_TOKENS, dtype=np.int32)
    numbers = np.arange(NUM_REQUESTS)
    columns = {name: np.ones(NUM_REQUESTS) for name in SCHEDULED_REQUESTS.names}
    columns |= {name: [None] * NUM_REQUESTS for name in ("generated_token_ids", "length_classes")}
    columns |= {"shard_position": numbers, "row_index": numbers, "request_id": numbers.astype(str)}
    arrays = {name: pa.array(columns[name]) for name in SCHEDULED_REQUESTS.names if name != "prompt_token_ids"}
    arrays["prompt_token_ids"] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
    fields = [arrays[field.name].cast(field.type) for field in SCHEDULED_REQUESTS]
    table = pa.Table.from_arrays(fields, schema=SCHEDULED_REQUESTS)
    pq.write_table(table, tmp_path / "shard.parquet", row_group_size=ROW_GROUP)
    del table, fields, arrays
    total_bytes, held_before = tokens.nbytes, pa.total_allocated_bytes()
    reader = ShardReader(tmp_path / "shard.parquet", seed=0, is_two_ended=True, done_rows=())
    running = []
    for step in range(NUM_REQUESTS // 2):  # from both ends; one request of each row group goes on and on
        for position in (step, NUM_REQUESTS - 1 - step):
            request = reader.request(position)
            assert request.prompt_token_ids[0] == position * PROMPT_TOKENS
            if position % ROW_GROUP == 0:
                running.append(request)
        assert pa.total_allocated_bytes() - held_before < total_bytes / 4
    assert len(running) == NUM_REQUESTS // ROW_GROUP
