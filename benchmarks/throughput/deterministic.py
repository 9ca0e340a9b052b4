"""What `deterministic` costs on a GPU: python benchmarks/throughput/deterministic.py [NUMBERxINPUT+OUTPUT …]

Equal requests run twice with and twice without it, Llama-3.1-8B shape, random weights; the second run of each counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from blendserve_engine import run
from ordered_requests import read_ordered_requests
from run import LIMITS, model_folder, write_equal_requests

from blendserve.engine.engine import LLMEngine
from blendserve.spec import EngineSpec, SamplingSpec


def main() -> None:
    parser = argparse.ArgumentParser()
    default = ["500x600+100", "150x2000+4"]
    parser.add_argument("workload", nargs="*", default=default, metavar="NUMBERxINPUT+OUTPUT")
    names = parser.parse_args().workload
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = model_folder(scratch / "model")
        workloads = {name: read_ordered_requests(write_equal_requests(name, scratch / name), "dfs") for name in names}
        for is_deterministic in (False, True):
            stated = {**LIMITS, "block_size": 128, "deterministic": is_deterministic}
            spec = EngineSpec(device="cuda", load_format="dummy", **stated)
            engine = LLMEngine(folder, spec, SamplingSpec(ignore_eos=True))
            for workload, requests in workloads.items():
                for _ in range(2):  # the first one compiles and captures
                    engine.clear_prefix_cache()
                    figures = run(engine, requests, None)
                print(json.dumps({"workload": workload, "deterministic": is_deterministic, **figures}), flush=True)
            del engine
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
