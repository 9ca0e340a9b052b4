"""Planning at scale against what DuckDB alone needs to sort the same table by its token column and write it.

    python benchmarks/planner/scale.py --requests 1000000 --tokens 1000 --output results.json

Each measurement is a process of its own, so that its peak memory and its processor time are its own; the load averages
before and after say how much the machine had to do besides.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from provenance import provenance

from blendserve.job_folder import JobFolder
from blendserve.planner.analyze import analyze
from blendserve.planner.plan import make_plan
from blendserve.schemas import TOKENIZED_REQUESTS
from blendserve.spec import JobSpec

MODEL = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}
GROUP = 500  # requests that share a third of their prompts
BATCH = 10_000


def write_table(folder: JobFolder, num_requests: int, num_tokens: int) -> None:
    random = np.random.default_rng(0)
    folder.work.mkdir(parents=True)
    shared = num_tokens // 3
    prefixes = random.integers(0, 128_000, (num_requests // GROUP + 1, shared), dtype=np.int32)
    order = random.permutation(num_requests)
    with pq.ParquetWriter(folder.relation("tokenized_requests"), TOKENIZED_REQUESTS) as writer:
        for begin in range(0, num_requests, BATCH):
            rows = np.arange(begin, min(begin + BATCH, num_requests))
            tokens = random.integers(0, 128_000, (len(rows), num_tokens), dtype=np.int32)
            tokens[:, :shared] = prefixes[order[rows] // GROUP]
            offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int32) * num_tokens)
            hints = np.where(random.random(len(rows)) < 0.1, 1500, 20).astype(np.int32)
            columns = {
                "row_index": rows,
                "request_id": pa.array(rows).cast(pa.string()),
                "prompt_token_ids": pa.ListArray.from_arrays(offsets, pa.array(tokens.reshape(-1))),
                "num_prompt_tokens": np.full(len(rows), num_tokens, np.int32),
                "max_tokens": np.full(len(rows), 2000, np.int32),
                "output_tokens_hint": hints,
            }
            writer.write_table(pa.table(columns, schema=TOKENIZED_REQUESTS))


def sort_with_duckdb(folder: JobFolder) -> dict:
    spill = folder.root / "spill"
    connection = duckdb.connect(config={"memory_limit": "4GiB", "threads": 2, "temp_directory": str(spill)})
    started = time.monotonic()
    source = {"source": str(folder.relation("tokenized_requests")), "sorted": str(folder.root / "sorted.parquet")}
    connection.execute(
        "copy (from read_parquet($source) order by prompt_token_ids) to $sorted (format parquet)", source
    )
    return {"seconds": time.monotonic() - started}


def plan(folder: JobFolder) -> dict:
    model = folder.root / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(MODEL))
    spec = JobSpec(input="x", output=str(folder.root), hardware="a100-80gb")
    started = time.monotonic()
    analyze(folder, dedupe=True)
    analyzed = time.monotonic()
    manifest = make_plan(folder, spec, model)
    return {
        "seconds": time.monotonic() - started,
        "analyze_seconds": analyzed - started,
        "plan_seconds": time.monotonic() - analyzed,
        "num_shards": len(manifest.shards),
        "sharing_kept": manifest.summary["prefix_sharing"] / manifest.summary["prefix_sharing_optimal"],
    }


MEASUREMENTS = {"duckdb": sort_with_duckdb, "planner": plan}


def measure(name: str, root: str) -> dict:
    """Run one measurement in a new process."""
    command = [sys.executable, __file__, "--measure", name, "--folder", root]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--folder")
    parser.add_argument("--measure", choices=MEASUREMENTS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.measure:
        figures = MEASUREMENTS[arguments.measure](JobFolder(Path(arguments.folder)))
        used = resource.getrusage(resource.RUSAGE_SELF)
        figures |= {"user_seconds": used.ru_utime, "system_seconds": used.ru_stime}
        print(json.dumps({**figures, "peak_memory_bytes": used.ru_maxrss * 1024}))
        return
    origin, load_before = provenance(), os.getloadavg()[0]
    with TemporaryDirectory(dir=arguments.folder) as root:
        write_table(JobFolder(Path(root)), arguments.requests, arguments.tokens)
        figures = {name: measure(name, root) for name in MEASUREMENTS}
    result = {
        **origin,
        **figures,
        "times_duckdb": figures["planner"]["seconds"] / figures["duckdb"]["seconds"],
        "load_average": {"before": load_before, "after": os.getloadavg()[0]},
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
