"""A whole job without a GPU: its real steps and the engine's own scheduler, on a clock that follows the cost model.

    python benchmarks/planner/engine_replay.py [--requests 10000] [--workloads #1,#2] [--shards 1] [--overlap off]
        --output results.json

`analyze`, the sample, `make_plan` and the shard files are the job's; the scheduler, its prefix cache and what it learns
are the engine's. Only the model is missing: a step takes what the simulator says it would, and each request ends after
its drawn number of tokens. Once with lengths given for every row, once with none, and once depth first. With overlap on
a step is that of the paper's A100 at its peaks, off that of an H100 by what the engine gets out of it.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mixes import draw_parts
from provenance import provenance

import blendserve.planner.plan
from blendserve.engine.kv_cache import KVCache
from blendserve.engine.request import Completion, FinishReason
from blendserve.engine.scheduler import Scheduler
from blendserve.engine.shard_reader import ShardReader
from blendserve.job_folder import JobFolder
from blendserve.planner.analyze import analyze
from blendserve.planner.database import open_database
from blendserve.planner.performance_model import as_achieved, load_hardware, load_model_shape
from blendserve.planner.plan import make_plan
from blendserve.planner.requests import compute_costs
from blendserve.planner.sample import write_sample_plan
from blendserve.planner.simulate import simulated_machine
from blendserve.planner.workload import RequestLengths, write_workload
from blendserve.schemas import COMPLETIONS, TOKENIZED_REQUESTS
from blendserve.spec import JobSpec

CONFIG = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
MAX_TOKENS = 131_072
BLOCK_SIZE, MAX_NUM_SEQS, MAX_BATCHED_TOKENS = 128, 1024, 8192
PACED_TOKENS = 1  # the simulated machine overlaps any number of them


def in_one_part(parts: list[RequestLengths]) -> RequestLengths:
    """All requests as if of one source: what stands in their prompts says nothing of their kind, but for the groups."""
    begins = np.cumsum([0, *(int(part.group.max(initial=-1)) + 1 for part in parts)])
    groups = [np.where(part.group < 0, -1, part.group + begin) for part, begin in zip(parts, begins, strict=False)]
    names = ("prefix_tokens", "own_tokens", "output_tokens")
    return RequestLengths(
        np.concatenate(groups), *(np.concatenate([getattr(part, name) for part in parts]) for name in names)
    )


def write_tokenized(folder: JobFolder, parts: list, hints: bool) -> np.ndarray:
    """The relation `tokenized_requests`; returns the output lengths by row."""
    folder.work.mkdir(parents=True)
    path = folder.work / "workload.parquet"
    write_workload(path, parts, np.random.default_rng(0))
    table = pq.read_table(path)
    outputs = table["output_tokens"].to_numpy().astype(np.int64)
    count = table.num_rows
    columns = {
        "row_index": np.arange(count),
        "request_id": [str(row) for row in range(count)],
        "prompt_token_ids": table["prompt_token_ids"],
        "num_prompt_tokens": pa.compute.list_value_length(table["prompt_token_ids"]),
        "max_tokens": np.full(count, MAX_TOKENS, np.int32),
        "output_tokens_hint": outputs.astype(np.int32) if hints else pa.nulls(count, pa.int32()),
    }
    pq.write_table(pa.table(columns, schema=TOKENIZED_REQUESTS), folder.relation("tokenized_requests"))
    return outputs


def replay(reader: ShardReader, outputs: np.ndarray, limit: int, machine) -> tuple[dict, list[dict]]:
    """Run a shard; returns its figures and its completions."""
    cache = KVCache(machine.capacity_tokens // BLOCK_SIZE, BLOCK_SIZE, True)
    scheduler = Scheduler(
        reader,
        cache,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        max_model_len=2 * MAX_TOKENS,
        paced_tokens=PACED_TOKENS if machine.interference < 1 else None,
        weights_tokens=round(machine.step_seconds / machine.constants.seconds_per_kv_token),
    )
    running, constants = scheduler.running, machine.constants
    counts = ("num_steps", "num_preemptions", "num_tokens", "num_repeated_tokens")
    total = dict.fromkeys(("seconds", "compute_seconds", "memory_seconds", "schedule_seconds", *counts), 0)
    completions = []
    lengths = np.minimum(outputs, limit)
    wanted = np.zeros(MAX_NUM_SEQS, np.int64)  # by row of the running requests
    serials = np.zeros(MAX_NUM_SEQS, np.int64)
    while scheduler.has_unfinished:
        began = time.perf_counter()
        batch = scheduler.schedule()
        total["schedule_seconds"] += time.perf_counter() - began
        tokens = batch.num_prefill_tokens + len(batch.decode_rows)
        pairs = sum(chunk.num_tokens * (chunk.start + chunk.num_tokens / 2) for chunk in batch.prefills)
        compute = (
            tokens * constants.seconds_per_layer_token
            + len(batch.sampled_rows) * constants.seconds_per_sampled_token
            + pairs * constants.seconds_per_attended_pair
        )
        work = machine.step(compute, int(batch.decode_positions.sum()))
        total["seconds"] += work.seconds
        total["compute_seconds"] += work.compute
        total["memory_seconds"] += work.memory
        total["num_steps"] += 1
        total["num_preemptions"] += batch.num_preempted
        total["num_tokens"] += tokens
        total["num_repeated_tokens"] += sum(
            chunk.num_tokens for chunk in batch.prefills if chunk.request.num_preemptions
        )
        rows = batch.sampled_rows[running.serials[batch.sampled_rows] == batch.sampled_serials]
        running.record(rows, np.ones(len(rows), dtype=np.int32))
        for row in rows[serials[rows] != running.serials[rows]].tolist():
            wanted[row], serials[row] = lengths[running.request(row).row_index], running.serials[row]
        for row in rows[running.known_tokens[rows] >= wanted[rows]].tolist():
            request = scheduler.finish(row)
            count = len(request.output_token_ids)
            reason = FinishReason.LENGTH if count < outputs[request.row_index] else FinishReason.STOP
            completion = Completion.of(request, reason, "x")
            reader.finish(completion)
            completions.append(completion)
    return total, completions


def write_completions(folder: JobFolder, completions: list[Completion]) -> None:
    rows = [
        {
            "row_index": completion.row_index,
            "request_id": completion.request_id,
            "completion": "x",
            "completion_token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason.value,
            "error": None,
            "num_prompt_tokens": completion.num_prompt_tokens,
            "num_cached_tokens": completion.num_cached_tokens,
            "num_completion_tokens": len(completion.token_ids),
        }
        for completion in completions
    ]
    path = folder.completions / "sample" / "shard-00000" / "part-00000.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=COMPLETIONS), path)


def run_job(
    root: Path, parts: list, machine, hardware: str, *, is_known: bool, policy: str, shards: int | None
) -> dict:
    folder, model = JobFolder(root / "job"), root / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(CONFIG))
    outputs = write_tokenized(folder, parts, is_known)
    spec = JobSpec(
        input="x",
        output=str(folder.root),
        hardware=hardware,
        policy=policy,
        shards=shards,
        max_tokens=MAX_TOKENS,
    )
    analyze(folder, dedupe=False)
    runs = {}
    if not is_known and write_sample_plan(folder, spec, model):
        (file,) = folder.sample.glob("shards-*/*.parquet")
        limit = int(pq.read_table(file, columns=["max_tokens"])["max_tokens"][0].as_py())
        runs["sample"], done = replay(
            ShardReader(file, seed=0, is_two_ended=False, done_rows=()), outputs, limit, machine
        )
        write_completions(folder, done)
    plan = make_plan(folder, spec, model)
    for shard in plan.shards:
        reader = ShardReader(folder.plan / shard.file, seed=0, is_two_ended=plan.is_two_ended, done_rows=())
        runs[f"shard {shard.shard}"], _ = replay(reader, outputs, MAX_TOKENS, machine)
    seconds, num_tokens, num_repeated = (
        sum(run[name] for run in runs.values()) for name in ("seconds", "num_tokens", "num_repeated_tokens")
    )
    return {"seconds": seconds, "repeated_share": num_repeated / num_tokens, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--workloads", default="#1,#2,#3,#4")
    parser.add_argument("--shards", type=int)
    parser.add_argument("--overlap", choices=["on", "off"], default="on")
    parser.add_argument("--placement", choices=["clustered", "shuffled"], default="clustered")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    result = {**provenance(), "rows": []}
    shape, is_overlapped = load_model_shape("llama-3.1-8b"), arguments.overlap == "on"
    hardware = "a100-80gb" if is_overlapped else "h100"
    if is_overlapped:  # as in the paper: the data sheet's peaks, which the plan has to expect too then
        blendserve.planner.plan.as_achieved = lambda hardware, _: hardware
        machine = simulated_machine(shape, load_hardware(hardware), is_overlapped=True)
    else:
        machine = simulated_machine(shape, as_achieved(load_hardware(hardware), shape), is_overlapped=False)
    for workload in arguments.workloads.split(","):
        with TemporaryDirectory() as folder, open_database(Path(folder)) as database:
            parts = draw_parts(partial(compute_costs, database, machine.constants), workload, arguments.requests)
            if arguments.placement == "shuffled":
                parts = [in_one_part(parts)]
            jobs = {
                name: run_job(
                    Path(folder) / name,
                    parts,
                    machine,
                    hardware,
                    is_known=name != "learnt",
                    policy="dfs" if name == "dfs" else "blend",
                    shards=arguments.shards,
                )
                for name in ("known", "learnt", "dfs")
            }
        ratio = jobs["learnt"]["seconds"] / jobs["known"]["seconds"]
        result["rows"].append({"workload": workload, "learnt_over_known": ratio, **jobs})
        shown = {name: (round(job["seconds"], 1), round(job["repeated_share"], 5)) for name, job in jobs.items()}
        print(workload, round(ratio, 4), "seconds and share of tokens computed again:", shown, flush=True)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
