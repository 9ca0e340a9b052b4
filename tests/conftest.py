"""Tiny seeded models that every test may run on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Models here are tiny: threads would only wait for each other. Before torch is imported, and for child processes too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "{{ '<' + message['role'] + '>' + message['content'] + '</>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def build_tiny_model(folder: Path, *, chat_template: str | None = None, seed: int = 0) -> Path:
    """A Llama of two layers with random weights and a tokenizer of one token a byte, as save_pretrained writes them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE({**vocabulary, "<end>": len(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", chat_template=chat_template)
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary) + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        eos_token_id=len(vocabulary),
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a chat template; 257 tokens, a context of 256."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture(scope="session")
def tiny_chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With CHAT_TEMPLATE."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny_chat_model"), chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def object_store() -> Iterator[dict[str, str]]:
    """A running S3-compatible object store, as the environment that leads to it."""
    from tests.object_store import running_object_store

    with running_object_store() as environment:
        yield environment


# These files take longest. They are begun first, so that no worker is left with one of them at the end.
_LONGEST_FILES = (
    "test_cluster.py",
    "test_runs_without_server.py",
    "test_demo.py",
    "test_interruption.py",
    "test_run.py",
    "test_object_store.py",
    "test_run_shards.py",
    "test_random_kills.py",
    "test_scheduler.py",
    "test_wheel.py",
    "test_smollm2.py",
    "test_compile_for_hopper.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(_LONGEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
