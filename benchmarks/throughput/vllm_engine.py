"""vLLM's part of `run.py`: python vllm_engine.py REQUEST.json RESULT.jsonl"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from ordered_requests import read_ordered_requests
from vllm import LLM, SamplingParams
from vllm import __version__ as version


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(
        model=request["model"],
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=True,
        gpu_memory_utilization=0.92,
        **request["settings"]["limits"],
    )

    def generate(prompts, output_tokens) -> float:
        parameters = [
            SamplingParams(max_tokens=int(tokens), ignore_eos=True, temperature=0.0, detokenize=False)
            for tokens in output_tokens
        ]
        inputs = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        started = time.perf_counter()
        outputs = llm.generate(inputs, parameters, use_tqdm=False)
        seconds = time.perf_counter() - started
        assert all(len(o.outputs[0].token_ids) == n for o, n in zip(outputs, output_tokens, strict=True))
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        return seconds, cached

    with Path(sys.argv[2]).open("w") as results:
        for job in request["jobs"]:
            requests = read_ordered_requests(Path(job["folder"]), job["order"])
            generate(requests.prompts[:8], [4] * len(requests.prompts[:8]))
            llm.reset_prefix_cache()
            seconds, cached = generate(requests.prompts, requests.output_tokens)
            figures = {
                "version": version,
                "seconds": seconds,
                "tokens_per_second": requests.num_tokens / seconds,
                "num_tokens": requests.num_tokens,
                "prefix_sharing": cached / requests.num_prompt_tokens,
            }
            results.write(json.dumps(figures) + "\n")
            results.flush()
            llm.reset_prefix_cache()


if __name__ == "__main__":
    main()
