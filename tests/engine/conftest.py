"""Models that the engine's tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import blendserve.engine  # noqa: F401 - says how torch's threads wait, so it comes before torch
from tests.engine.engine_runs import ModelFactory, save_tiny_model


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """The folder of a tiny model of the asked type and shape, made once a session."""
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", **overrides: Any) -> Path:
        key = repr((model_type, sorted(overrides.items(), key=str)))
        if key not in made:
            made[key] = save_tiny_model(tmp_path_factory.mktemp("model"), model_type, **overrides)
        return made[key]

    return make


@pytest.fixture(scope="session")
def llama(make_model: ModelFactory) -> Path:
    """Eight heads over two KV heads, untied embeddings."""
    return make_model(num_attention_heads=8, num_key_value_heads=2)
