"""Where a step's GPU time goes, kernel by kernel: python profile_kernels.py NUMBERxINPUT+OUTPUT [OPTION=VALUE …]"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from blendserve_engine import Source
from ordered_requests import read_ordered_requests
from run import LIMITS, model_folder, write_equal_requests
from torch.profiler import ProfilerActivity, profile

from blendserve.engine.engine import LLMEngine
from blendserve.spec import EngineSpec, SamplingSpec


def main() -> None:
    workloads = [argument for argument in sys.argv[1:] if "=" not in argument]
    options = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        spec = EngineSpec(device="cuda", load_format="dummy", **{**LIMITS, "block_size": 128, **options})
        engine = LLMEngine(model_folder(scratch / "model"), spec, SamplingSpec(ignore_eos=True))
        for workload in workloads:
            requests = read_ordered_requests(write_equal_requests(workload, scratch / workload), "dfs")
            for is_profiled in (False, True):  # first captures and compiles
                engine.clear_prefix_cache()
                steps: list = []
                with profile(activities=[ProfilerActivity.CUDA] if is_profiled else []) as profiler:
                    engine.run(
                        Source(requests), on_finished=lambda _: None, on_step=steps.append, should_stop=lambda: False
                    )
                    torch.cuda.synchronize()
            total: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
            for event in profiler.events():
                total[event.name][0] += 1
                total[event.name][1] += event.device_time
            everything = sum(microseconds for _, microseconds in total.values())
            seconds = sum(step.step_seconds for step in steps)
            print(f"\n{workload}: {len(steps)} steps, {seconds:.3f} s, kernels {everything / 1e6:.3f} s")
            for kernel, (count, microseconds) in sorted(total.items(), key=lambda item: -item[1][1])[:18]:
                share = microseconds / everything
                each = microseconds / count
                print(f"{share:6.1%} {microseconds / 1e3:10.2f} ms {count:7d} x {each:9.1f} us  {kernel[:90]}")


if __name__ == "__main__":
    main()
