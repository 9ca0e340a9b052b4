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
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mixes import draw_parts
from provenance import provenance

from benchmarks.dry_run import DryRun
from benchmarks.throughput.run import LLAMA_3_1_8B
from blendserve.engine.kv_cache import KVCache
from blendserve.engine.request import Completion, FinishReason
from blendserve.engine.scheduler import Scheduler
from blendserve.engine.shard_reader import ShardReader
from blendserve.hardware_profile import AffineFit, HardwareProfile, ProfiledModel, write_profile
from blendserve.job_folder import JobFolder
from blendserve.models.config import ModelShape
from blendserve.planner.analyze import analyze
from blendserve.planner.database import open_database
from blendserve.planner.performance_model import (
    Hardware,
    cost_constants,
    load_hardware,
    load_model_shape,
    step_floor_seconds,
)
from blendserve.planner.plan import make_plan
from blendserve.planner.planned_engine import plan_hardware
from blendserve.planner.requests import compute_costs
from blendserve.planner.sample import write_sample_plan
from blendserve.planner.simulate import simulated_machine
from blendserve.planner.workload import RequestLengths, write_workload
from blendserve.schemas import COMPLETIONS, TOKENIZED_REQUESTS
from blendserve.spec import JobSpec

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


def profile_at_peaks(hardware: Hardware, shape: ModelShape) -> HardwareProfile:
    """What measuring `hardware` would give if all reached its data sheet's peaks, both kinds of work side by side."""
    constants, floor = cost_constants(shape, hardware), step_floor_seconds(shape, hardware)

    def fit(seconds_per_unit: float, floor_seconds: float = 0.0) -> AffineFit:
        free_units = floor_seconds / seconds_per_unit
        return AffineFit(fixed_seconds=floor_seconds, seconds_per_unit=seconds_per_unit, free_units=free_units)

    return HardwareProfile(
        device=hardware.name,
        memory_bytes=hardware.memory_bytes,
        model=ProfiledModel.of(shape),
        bytes_per_element=hardware.bytes_per_element,
        gemm=fit(constants.seconds_per_layer_token, floor),
        head=fit(constants.seconds_per_sampled_token),
        prefill_attention=fit(constants.seconds_per_attended_pair),
        decode_attention=fit(1 / hardware.bytes_per_second),
        interference=0.0,
        commit="",
        measured_at="never: by the data sheet",
    )


def replay(reader: ShardReader, outputs: np.ndarray, limit: int, machine) -> tuple[dict, list[Completion]]:
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
    constants = machine.constants
    counts = ("num_steps", "num_preemptions", "num_tokens", "num_repeated_tokens")
    total = dict.fromkeys(("seconds", "compute_seconds", "memory_seconds", "schedule_seconds", *counts), 0)
    completions = []
    lengths = np.minimum(outputs, limit)
    for batch, ended, schedule_seconds in DryRun(scheduler, lambda request: lengths[request.row_index]).steps():
        total["schedule_seconds"] += schedule_seconds
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
        for request in ended:
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


def run_job(folder: JobFolder, model: Path, spec: JobSpec, parts: list, machine, *, is_known: bool) -> dict:
    outputs = write_tokenized(folder, parts, is_known)
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


def replay_workload(root: Path, spec: JobSpec, workload: str, num_requests: int, placement: str) -> dict:
    """root: the model's folder, in which the jobs are made."""
    is_overlapped = spec.overlap == "on"
    machine = simulated_machine(load_model_shape(root), plan_hardware(spec, root), is_overlapped=is_overlapped)
    jobs = {}
    with TemporaryDirectory(dir=root) as folder, open_database(Path(folder)) as database:
        parts = draw_parts(partial(compute_costs, database, machine.constants), workload, num_requests)
        if placement == "shuffled":
            parts = [in_one_part(parts)]
        for name, policy in (("known", "blend"), ("learnt", "blend"), ("dfs", "dfs")):
            job = JobFolder(Path(folder) / name)
            job_spec = spec.model_copy(update={"policy": policy})
            jobs[name] = run_job(job, root, job_spec, parts, machine, is_known=name != "learnt")
    return {"workload": workload, "learnt_over_known": jobs["learnt"]["seconds"] / jobs["known"]["seconds"], **jobs}


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
    with TemporaryDirectory() as folder:
        root, hardware = Path(folder), "h100"
        (root / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
        if arguments.overlap == "on":  # as in the paper
            hardware = str(root / "peaks.json")
            write_profile(Path(hardware), profile_at_peaks(load_hardware("a100-80gb"), load_model_shape(root)))
        options = {"hardware": hardware, "overlap": arguments.overlap, "shards": arguments.shards}
        spec = JobSpec(input="requests", output="job", max_tokens=MAX_TOKENS, **options)
        for workload in arguments.workloads.split(","):
            row = replay_workload(root, spec, workload, arguments.requests, arguments.placement)
            result["rows"].append(row)
            jobs = {name: row[name] for name in ("known", "learnt", "dfs")}
            shown = {name: (round(job["seconds"], 1), round(job["repeated_share"], 5)) for name, job in jobs.items()}
            ratio = round(row["learnt_over_known"], 4)
            print(workload, ratio, "seconds and share of tokens computed again:", shown, flush=True)
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
