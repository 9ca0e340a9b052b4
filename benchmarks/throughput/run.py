"""Runs the same requests in the same order on BlendServe's engine and on vLLM, one after the other on one GPU.

    PYTHONPATH=kernels:.[:VLLM] python benchmarks/throughput/run.py --workload FOLDER [FOLDER …] --order dfs
        [--engine blendserve vllm] [--output results.json] [--set max_num_batched_tokens=4096 …]

FOLDER is one of workloads.py, or NUMBERxINPUT+OUTPUT, as 1000x32+1024, for equal requests that share nothing;
FOLDER:ORDER[,ORDER …] has orders of its own. vLLM knows no blend: beside that it runs the same requests in order dfs.
Each engine runs in a process of its own, which loads random weights of the Llama-3.1-8B shape once and then takes the
workloads in turn; loading and a warm-up are not counted. Prints a JSON line for each workload and order. Tokens are
input plus output, outputs have fixed lengths, sampling is greedy; vLLM neither tokenizes nor detokenizes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
# The same limits for both; each engine's own way of writing them is in its file.
LIMITS = {"max_num_seqs": 1024, "max_num_batched_tokens": 8192, "max_model_len": 32768}


def model_folder(folder: Path) -> Path:
    """A config.json of the shape, and a tokenizer of as many words, since random weights speak no language."""
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
    words = {f"w{number}": number for number in range(LLAMA_3_1_8B["vocab_size"])}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    return folder


def write_equal_requests(name: str, folder: Path) -> Path:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    number, num_input, num_output = map(int, re.fullmatch(r"(\d+)x(\d+)\+(\d+)", name).groups())
    folder.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(10, 30_000, number * num_input, dtype=np.int32)
    prompts = pa.ListArray.from_arrays(np.arange(0, number * num_input + 1, num_input, dtype=np.int32), tokens)
    output_tokens = np.full(number, num_output, dtype=np.int32)
    requests = pa.table({"prompt_token_ids": prompts, "output_tokens": output_tokens})
    pq.write_table(requests, folder / "requests.parquet")
    orders = {
        "policy": ["dfs"] * number,
        "row": np.arange(number),
        "position": np.arange(number),
        "compute_seconds": np.ones(number),
        "memory_seconds": np.ones(number),
        "unit_density": np.ones(number),
    }
    pq.write_table(pa.table(orders), folder / "orders.parquet")
    return folder


def folder_of(workload: str, scratch: Path) -> str:
    if re.fullmatch(r"\d+x\d+\+\d+", workload) is None:
        return workload
    folder = scratch / workload
    return str(folder if folder.is_dir() else write_equal_requests(workload, folder))


def run_engine(engine: str, jobs: list[dict], settings: dict, scratch: Path, keep: Path) -> Iterator[dict]:
    """The engine's own figures for each job, as they come, from a process of its own. Its log is kept."""
    request = scratch / f"{engine}.json"
    request.write_text(json.dumps({"jobs": jobs, "settings": settings, "model": str(scratch / "model")}))
    result = keep / f"{engine}.jsonl"
    result.unlink(missing_ok=True)
    environment = {**os.environ, "VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, str(Path(__file__).parent / f"{engine}_engine.py"), str(request), str(result)]
    log = keep / f"{engine}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    num_read, is_running = 0, True
    while is_running:
        is_running = process.poll() is None
        lines = result.read_text().splitlines() if result.exists() else []
        yield from map(json.loads, lines[num_read:])
        num_read = len(lines)
        time.sleep(0.5 if is_running else 0.0)
    if process.returncode != 0:
        sys.stderr.write("\n".join(log.read_text().splitlines()[-40:]))
        sys.stderr.write(f"\n{engine} ended with status {process.returncode}\n")


def vllm_jobs(jobs: list[dict]) -> dict[int, dict]:
    """What vLLM runs, by the number of the job: depth-first instead of blended, unless that is a job already."""
    own = {(job["folder"], job["order"]) for job in jobs}
    return {
        number: job | {"order": "dfs"} if job["order"] == "blend" else job
        for number, job in enumerate(jobs)
        if job["order"] != "blend" or (job["folder"], "dfs") not in own
    }


def vllm_figures(line: dict, lines: list[dict]) -> dict | None:
    """vLLM's of the same workload and order; of depth-first order where the order is blend."""
    if "vllm" in line:
        return line["vllm"]
    order = "dfs" if line["order"] == "blend" else line["order"]
    return next(
        (
            other["vllm"]
            for other in lines
            if other["workload"] == line["workload"] and other["order"] == order and "vllm" in other
        ),
        None,
    )


def commit() -> str:
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return found or os.environ.get("BLENDSERVE_COMMIT", "unknown")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workload", nargs="+", required=True)
    parser.add_argument("--order", nargs="+", default=["dfs"])
    parser.add_argument("--engine", nargs="+", choices=["blendserve", "vllm"], default=["blendserve", "vllm"])
    parser.add_argument("--set", nargs="*", default=[], metavar="OPTION=VALUE", help="engine options of BlendServe")
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--keep", type=Path, help="a folder for the engines' logs and BlendServe's metrics of each step"
    )
    parser.add_argument("--commit", default=commit())
    arguments = parser.parse_args()
    options = dict(option.split("=", 1) for option in arguments.set)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model_folder(scratch / "model")
        keep = arguments.keep or scratch
        keep.mkdir(parents=True, exist_ok=True)
        jobs = [
            {"workload": Path(name).name, "folder": folder_of(name, scratch), "order": order}
            for name, _, orders in (workload.partition(":") for workload in arguments.workload)
            for order in (orders.split(",") if orders else arguments.order)
        ]
        settings = {"limits": LIMITS, "options": options}
        lines: list[dict] = [
            {"workload": job["workload"], "order": job["order"], "commit": arguments.commit} for job in jobs
        ]
        command = "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        for engine in arguments.engine:
            mine = vllm_jobs(jobs) if engine == "vllm" else dict(enumerate(jobs))
            all_figures = run_engine(engine, list(mine.values()), settings, scratch, keep)
            for (number, job), figures in zip(mine.items(), all_figures, strict=False):
                line = lines[number]
                line[engine] = {"order": job["order"]} | figures
                peer = vllm_figures(line, lines)
                if "blendserve" in line and peer is not None:
                    line["ratio"] = line["blendserve"]["tokens_per_second"] / peer["tokens_per_second"]
                print(json.dumps(line), flush=True)
                if arguments.output:
                    content = {"command": command, "settings": settings, "runs": lines}
                    arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
