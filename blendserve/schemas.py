"""The Parquet schemas at every boundary between two steps, each declared once.

`row_index` is a row's position in the input, from 0; it is the key that every step joins on, because it is
dense, small and sorts in input order. `request_id` is the user's key and travels along.
"""

from __future__ import annotations

import pyarrow as pa

_TOKEN_IDS = pa.list_(pa.int32())
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def _schema(*fields: tuple[str, pa.DataType, bool]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=nullable) for name, kind, nullable in fields])


# extract → tokenize. One row per input row; exactly one of prompt, messages, prompt_token_ids and error is set.
REQUESTS = _schema(
    ("row_index", pa.int64(), False),
    ("request_id", pa.string(), False),
    ("prompt", pa.string(), True),
    ("messages", _MESSAGES, True),
    ("prompt_token_ids", _TOKEN_IDS, True),
    ("max_tokens", pa.int32(), True),
    ("output_tokens_hint", pa.int32(), True),
    ("error", pa.string(), True),
)

# tokenize → analyze. max_tokens is final here: the row's own or the job's, cut to what the context leaves.
TOKENIZED_REQUESTS = _schema(
    ("row_index", pa.int64(), False),
    ("request_id", pa.string(), False),
    ("prompt_token_ids", _TOKEN_IDS, False),
    ("num_prompt_tokens", pa.int32(), False),
    ("max_tokens", pa.int32(), False),
    ("output_tokens_hint", pa.int32(), True),
)

# tokenize → merge. Rows that never become a request, each with its reason.
REJECTED_REQUESTS = _schema(
    ("row_index", pa.int64(), False),
    ("request_id", pa.string(), False),
    ("error", pa.string(), False),
)

# analyze → plan. The requests in lexical order of their token ids, which is a depth-first walk of the prefix tree.
# shared_prefix_tokens: length of the common prefix with the row before (0 for the first).
# duplicate_of: row_index of the request whose completion answers this one too, else null.
SORTED_REQUESTS = _schema(
    ("sort_position", pa.int64(), False),
    ("row_index", pa.int64(), False),
    ("num_prompt_tokens", pa.int32(), False),
    ("shared_prefix_tokens", pa.int32(), False),
    ("duplicate_of", pa.int64(), True),
)

# analyze → plan, report. A node is the interval [first_position, first_position + num_requests) of the sorted
# requests that share their first depth_tokens tokens; edge_tokens of them are not shared by the parent's others.
PREFIX_NODES = _schema(
    ("node_id", pa.int64(), False),
    ("parent_id", pa.int64(), True),
    ("depth_tokens", pa.int32(), False),
    ("edge_tokens", pa.int32(), False),
    ("first_position", pa.int64(), False),
    ("num_requests", pa.int64(), False),
)

# plan. source: fixed (it can be no other), hint, sample, history or max_tokens (nothing better known).
OUTPUT_LENGTH_ESTIMATES = _schema(
    ("row_index", pa.int64(), False),
    ("estimated_output_tokens", pa.int32(), False),
    ("source", pa.string(), False),
)

# finish → sample and plan of later runs, beside the output folder. Sums over the requests of a class: prompts that
# begin alike and are about as long.
OUTPUT_LENGTH_HISTORY = _schema(
    ("prompt_begin", pa.string(), False),
    ("length_class", pa.int64(), False),
    ("num_requests", pa.float64(), False),
    ("output_tokens", pa.float64(), False),
    ("output_tokens_squared", pa.float64(), False),
)

# plan. Seconds on the plan's hardware; density = compute_seconds / memory_seconds.
REQUEST_COSTS = _schema(
    ("row_index", pa.int64(), False),
    ("num_prompt_tokens", pa.int32(), False),
    ("shared_prefix_tokens", pa.int32(), False),
    ("estimated_output_tokens", pa.int32(), False),
    ("compute_seconds", pa.float64(), False),
    ("memory_seconds", pa.float64(), False),
    ("density", pa.float64(), False),
)

# plan. Where each request that has to run stands in the plan.
REQUEST_ORDER = _schema(
    ("plan_position", pa.int64(), False),
    ("row_index", pa.int64(), False),
    ("unit_id", pa.int64(), False),
    ("unit_density", pa.float64(), False),
    ("shard", pa.int32(), False),
    ("shard_position", pa.int64(), False),
)

# plan → report. What the job would use by simulation, in pieces of equal length: work in seconds a second, by policy.
PREDICTED_USAGE = _schema(
    ("policy", pa.string(), False),
    ("started_seconds", pa.float64(), False),
    ("compute_share", pa.float64(), False),
    ("memory_share", pa.float64(), False),
    ("cache_share", pa.float64(), False),
)

# plan → run_shard. One file a shard, in plan order; a unit is a run of requests that share a prefix and stay together.
# generated_token_ids: the output so far of a request that the sample cut off, null: none. length_classes: see
# `blendserve.length_learning`; null where no length is learnt.
SCHEDULED_REQUESTS = _schema(
    ("shard_position", pa.int64(), False),
    ("row_index", pa.int64(), False),
    ("request_id", pa.string(), False),
    ("prompt_token_ids", _TOKEN_IDS, False),
    ("max_tokens", pa.int32(), False),
    ("estimated_output_tokens", pa.int32(), False),
    ("shared_prefix_tokens", pa.int32(), False),
    ("compute_seconds", pa.float64(), False),
    ("memory_seconds", pa.float64(), False),
    ("unit_id", pa.int64(), False),
    ("unit_density", pa.float64(), False),
    ("num_prompt_tokens", pa.int32(), True),
    ("generated_token_ids", _TOKEN_IDS, True),
    ("length_classes", _TOKEN_IDS, True),
)

# run_shard → merge. error is set exactly when finish_reason is "error".
COMPLETIONS = _schema(
    ("row_index", pa.int64(), False),
    ("request_id", pa.string(), False),
    ("completion", pa.string(), True),
    ("completion_token_ids", _TOKEN_IDS, False),
    ("finish_reason", pa.string(), False),
    ("error", pa.string(), True),
    ("num_prompt_tokens", pa.int32(), False),
    ("num_cached_tokens", pa.int32(), False),
    ("num_completion_tokens", pa.int32(), False),
)

# run_shard → report. One row per engine step.
STEP_METRICS = _schema(
    ("step", pa.int64(), False),
    ("started_seconds", pa.float64(), False),  # since the shard's first step
    ("step_seconds", pa.float64(), False),
    ("num_prefill_tokens", pa.int32(), False),
    ("num_decode_tokens", pa.int32(), False),
    ("num_running", pa.int32(), False),
    ("num_running_left", pa.int32(), False),  # admitted from the compute-heavy front
    ("num_waiting", pa.int32(), False),
    ("num_used_blocks", pa.int32(), False),
    ("num_total_blocks", pa.int32(), False),
    (
        "num_cached_tokens",
        pa.int32(),
        False,
    ),  # prompt tokens found in the cache by requests admitted in this step
    ("num_preempted", pa.int32(), False),
    ("kv_read_bytes", pa.int64(), False),  # KV cache that decode attention of this step reads
)

# merge → user: what every output row has besides its input columns.
RESULT_COLUMNS = _schema(
    ("request_id", pa.string(), False),
    ("completion", pa.string(), True),
    ("finish_reason", pa.string(), False),
    ("error", pa.string(), True),
    ("num_prompt_tokens", pa.int32(), True),
    ("num_cached_tokens", pa.int32(), True),
    ("num_completion_tokens", pa.int32(), True),
)
