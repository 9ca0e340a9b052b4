"""A tiny seeded model, a tiny input and an Airflow home of their own for the tests of the DAGs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

NUM_ROWS = 12


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights and a byte-level tokenizer, as save_pretrained writes them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_model")
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({**vocabulary, "<end>": len(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=len(vocabulary),
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A working directory with `requests.parquet`: twelve rows, half of them under one shared instruction."""
    prompts = [f"Say yes or no to this: is {n} even?" if n % 2 else f"{n} things" for n in range(NUM_ROWS)]
    rows = {
        "request_id": [f"row-{n}" for n in range(NUM_ROWS)],
        "prompt": prompts,
        "kind": ["a", "b"] * (NUM_ROWS // 2),
    }
    pq.write_table(pa.table(rows), tmp_path / "requests.parquet")
    return tmp_path


@pytest.fixture
def airflow_environment(workspace: Path) -> dict[str, str]:
    """Environment of an Airflow of this test's own; its form may read and write in the workspace only."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
    return own | {
        "BLENDSERVE_AIRFLOW_HOME": str(workspace / "airflow"),
        "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{own.get('PATH', '')}",
    }
