"""What a user may ask for: one job, as the command line, a `job.yaml` and Airflow's form all state it.

The field names are the option names (`max_tokens` is `--max-tokens`). Unknown keys are refused. The JSON schema
of `JobSpec` is where Airflow's form takes titles, descriptions, defaults and limits from.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from blendserve.errors import UsageError

Policy = Literal["blend", "dfs", "fcfs", "random", "longest"]
RowErrorPolicy = Literal["continue", "fail"]
DEFAULT_MODEL = "smollm2"
_LEAST_TEMPERATURE = 1e-5  # logits divided by less leave the range of float32


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SamplingSpec(_Spec):
    """How tokens are chosen and when a completion ends. `temperature` 0 is greedy, and so is one below 0.00001."""

    max_tokens: int = Field(256, ge=1, title="Max tokens", description="Longest completion, in tokens.")
    temperature: float = Field(
        0.0, ge=0.0, le=10.0, title="Temperature", description="0, or below 0.00001: the likeliest token."
    )
    top_p: float = Field(
        1.0, gt=0.0, le=1.0, title="Top-p", description="Smallest set of tokens with this probability."
    )
    top_k: int = Field(0, ge=0, lt=2**31, title="Top-k", description="Only the k likeliest tokens; 0 takes all.")
    seed: int = Field(0, ge=0, lt=2**63, title="Seed", description="Same seed, same request: same completion.")
    stop: tuple[str, ...] = Field((), title="Stop strings", description="A completion ends before the first of these.")
    ignore_eos: bool = Field(False, title="Ignore end of text", description="Always generate max_tokens tokens.")

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_string_is_a_list_of_it(cls, stop: object) -> object:
        return (stop,) if isinstance(stop, str) else stop

    @field_validator("temperature")
    @classmethod
    def _almost_greedy_is_greedy(cls, temperature: float) -> float:
        return 0.0 if temperature < _LEAST_TEMPERATURE else temperature

    @model_validator(mode="after")
    def _stop_strings_are_not_empty(self) -> SamplingSpec:
        if any(not text for text in self.stop):
            raise ValueError("stop: an empty stop string would end every completion at once; leave it out")
        return self


class EngineSpec(_Spec):
    """How the engine runs. None of this changes greedy output beyond the stated numeric tolerance."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", title="Device", description="auto: a GPU where there is one."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", title="Number format", description="auto: float32 on a CPU, bfloat16 on a GPU."
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto", title="Weights", description="dummy: random weights from the model's config, for benchmarks."
    )
    block_size: int | None = Field(
        None, ge=1, le=256, title="Block size", description="Tokens in a KV cache block. Empty: 16, on a GPU 128."
    )
    num_blocks: int | None = Field(None, ge=2, title="KV cache blocks", description="Empty: as many as memory allows.")
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        title="Max running requests",
        description="Requests that run at one time. Empty: 64, on a GPU 1024.",
    )
    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        title="Max tokens a step",
        description="Token budget of a step; longer prompts are prefilled in chunks. Empty: 512, on a GPU 8192.",
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        title="Max context",
        description="Prompt plus completion, in tokens. Empty: the model's own limit.",
    )
    prefix_cache: bool = Field(True, title="Prefix cache", description="Compute a shared prompt prefix once.")
    overlap: Literal["off", "on"] = Field(
        "off",
        title="Overlap",
        description="on: on a GPU, decodes run beside prefill chunks where a step has much of both.",
    )
    deterministic: bool = Field(
        False,
        title="Deterministic",
        description="Bitwise the same tokens whatever runs beside a request. Slower; on a CPU one request at a time.",
    )
    log_texts: bool = Field(
        False,
        title="Log texts",
        description="Prompts and completions in the shards' logs, which more people may read than the results.",
    )

    @field_validator("overlap", mode="before")
    @classmethod
    def _yaml_reads_on_as_true(cls, overlap: object) -> object:
        return ("on" if overlap else "off") if isinstance(overlap, bool) else overlap


class JobSpec(SamplingSpec, EngineSpec):
    """One job: where the rows come from, how they become prompts, what runs them, where the results go."""

    input: str = Field(title="Input", min_length=1, description="A Parquet file, a glob or a folder.")
    output: str = Field(title="Output", min_length=1, description="The job's own folder for results and state.")
    model: str = Field(
        DEFAULT_MODEL,
        min_length=1,
        title="Model",
        description="A short name, a folder with safetensors, or a hub name.",
    )
    sql: str | None = Field(
        None,
        title="SQL",
        description="One select over the input's rows, the table `input`; its columns take their place.",
    )
    id_column: str | None = Field(
        None, title="Id column", description="Unique ids. Empty: column request_id, or else the row number."
    )
    prompt_column: str | None = Field(
        None,
        title="Prompt column",
        description="Empty: prompt_token_ids, messages or prompt, the first that is there.",
    )
    template: str | None = Field(
        None, title="Prompt template", description="Jinja over the columns, e.g. `Summarize: {{ body }}`."
    )
    system: str | None = Field(None, title="System prompt", description="Put before every prompt.")
    raw: bool = Field(False, title="Raw prompts", description="Leave out the model's chat template.")
    truncate_prompt: bool = Field(
        False,
        title="Truncate prompts",
        description="Cut over-long prompts at their end instead of rejecting them.",
    )
    policy: Policy = Field("blend", title="Policy", description="The order in which requests run.")
    shards: int | None = Field(
        None, ge=1, title="Shards", description="Units of work and retry. Empty: the planner chooses."
    )
    gpus: int = Field(
        1, ge=1, title="GPUs", description="Shards that run side by side, one on each GPU; there are at least as many."
    )
    limit: int | None = Field(None, ge=1, title="Limit", description="Only the first N rows.")
    on_row_error: RowErrorPolicy = Field(
        "continue",
        title="On failed rows",
        description="fail: the job ends with status 1 when any row failed.",
    )
    sample_fraction: float = Field(
        0.01,
        ge=0.0,
        le=1.0,
        title="Sample",
        description="Share of the requests that run first to learn output lengths.",
    )
    hardware: str = Field(
        "auto",
        title="Hardware",
        description="What the plan's times are for: auto, cpu, a100-80gb, h100, h200, or a measured profile (.json).",
    )
    device_hour_price: float | None = Field(
        None,
        gt=0.0,
        title="Price of a device hour",
        description="In any currency: the plan then says what each policy would cost.",
    )
    force: bool = Field(
        False, title="Start over", description="Discard what the output folder holds of an earlier job."
    )

    @field_validator("output")
    @classmethod
    def _local_output_is_a_path(cls, output: str) -> str:
        """`~` is the home folder and `file:///x` the folder /x, as they are for the input."""
        path = output.removeprefix("file://")
        return path if "://" in path else os.path.expanduser(path)  # noqa: PTH111 - leaves the rest as it was stated

    @model_validator(mode="after")
    def _one_source_of_prompts(self) -> JobSpec:
        if self.template is not None and self.prompt_column is not None:
            raise ValueError("template and prompt_column exclude each other; name the column in the template instead")
        return self

    @property
    def sampling(self) -> SamplingSpec:
        return SamplingSpec(**{name: getattr(self, name) for name in SamplingSpec.model_fields})

    @property
    def engine(self) -> EngineSpec:
        return EngineSpec(**{name: getattr(self, name) for name in EngineSpec.model_fields})


def load_job(path: Path | None, overrides: dict[str, Any]) -> JobSpec:
    """The job that `path` (a YAML file, or none) states, with `overrides` (option name → value) on top.

    Raises UsageError, naming each wrong field.
    """
    stated: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"Job file {path} can't be read: {error}. Expected a YAML mapping of options.") from error
        if not isinstance(loaded, dict):
            raise UsageError(f"Job file {path} holds {type(loaded).__name__}, expected a mapping of options.")
        stated = {str(key).replace("-", "_"): value for key, value in loaded.items()}
    try:
        return JobSpec.model_validate({**stated, **overrides})
    except ValidationError as error:
        raise UsageError(describe_validation_error(error)) from error


def describe_validation_error(error: ValidationError) -> str:
    """One line a problem: the option, what is wrong, what was given."""
    lines = []
    for problem in error.errors():
        option = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(sorted(JobSpec.model_fields))
            lines.append(f"Unknown option '{option}'. Known options: {known}.")
        elif problem["type"] == "missing":
            lines.append(f"Option '{option}' is missing. Give --{option.replace('_', '-')} or set it in the job file.")
        else:
            got = f"; got {problem['input']!r}" if problem["loc"] else ""  # a whole job may hold what isn't for logs
            where = f"Option '{option}': " if problem["loc"] else ""
            lines.append(f"{where}{problem['msg'].removeprefix('Value error, ')}{got}.")
    return "\n".join(lines)
