"""The shape of a model, read from its config.json. Knows no torch, so that a planner can read it too."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blendserve.errors import ModelError

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: its base and how it is stretched over longer contexts."""

    theta: float
    rope_type: str
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder-only transformer with grouped-query attention and a gated MLP."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    @property
    def layer_parameters(self) -> int:
        """Parameters that every token multiplies: projections and MLPs of all layers, no embeddings, no head."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def head_parameters(self) -> int:
        """Parameters of the output head, which only sampled tokens multiply."""
        return self.hidden_size * self.vocab_size

    @property
    def kv_elements_per_token(self) -> int:
        """Numbers that one token adds to the KV cache: K and V of all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, bytes_per_element: int) -> int:
        """KV cache bytes of one token in all layers."""
        return bytes_per_element * self.kv_elements_per_token

    @classmethod
    def load(cls, folder: Path) -> ModelShape:
        """Read config.json, of a supported architecture or another. Raises ModelError where it lacks a size."""
        return _model_shape(_read_json(folder / "config.json"), folder)


@dataclass(frozen=True, slots=True)
class ModelConfig(ModelShape):
    """A dense decoder that can be run. `eos_token_ids` end a completion."""

    architecture: str
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    has_qk_norm: bool
    rope: RopeConfig
    eos_token_ids: tuple[int, ...]

    @classmethod
    def load(cls, folder: Path) -> ModelConfig:
        """Read config.json and, for the end-of-text tokens, generation_config.json.

        Raises ModelError when the architecture or one of its settings isn't supported.
        """
        config = _read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        eos = _read_json(generation).get("eos_token_id") if generation.is_file() else None
        _check_supported(config)
        shape = _model_shape(config, folder)
        try:
            return _model_config(config, shape, config.get("eos_token_id") if eos is None else eos)
        except KeyError as error:
            raise ModelError(
                f"{folder / 'config.json'} has no {error}. Expected the config of a "
                f"{config['architectures'][0]} as transformers writes it."
            ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read: {error}. Expected JSON as transformers writes it.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a JSON {type(content).__name__}, expected an object.")
    return content


def _model_shape(config: dict[str, Any], folder: Path) -> ModelShape:
    try:
        num_heads, hidden_size = int(config["num_attention_heads"]), int(config["hidden_size"])
        return ModelShape(
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or hidden_size // num_heads),
            intermediate_size=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
        )
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"{folder / 'config.json'} lacks or garbles a size of the model: {error!r}. Expected "
            "num_hidden_layers, hidden_size, num_attention_heads, intermediate_size and vocab_size, as the configs of "
            "Llama and Qwen have them."
        ) from error


def _model_config(config: dict[str, Any], shape: ModelShape, eos: int | list[int] | None) -> ModelConfig:
    architecture = config["architectures"][0]
    has_attention_bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        **asdict(shape),
        architecture=architecture,
        rms_norm_eps=config["rms_norm_eps"],
        max_position_embeddings=config["max_position_embeddings"],
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        has_qkv_bias=has_attention_bias or architecture == "Qwen2ForCausalLM",
        has_output_bias=has_attention_bias,
        has_mlp_bias=bool(config.get("mlp_bias", False)),
        has_qk_norm=architecture == "Qwen3ForCausalLM",
        rope=_rope_config(config),
        eos_token_ids=_eos_token_ids(eos),
    )


def _check_supported(config: dict[str, Any]) -> None:
    architecture = (config.get("architectures") or ["(none named)"])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ModelError(
            f"Architecture {architecture} is not supported. Supported: {', '.join(SUPPORTED_ARCHITECTURES)}."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"Activation '{config['hidden_act']}' of this {architecture} is not supported, only 'silu'.")
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and window < config["max_position_embeddings"]:
        raise ModelError(
            f"This {architecture} attends to a sliding window of {window} tokens, which is not supported: "
            "every token must attend to its whole context."
        )
    layer_types = set(config.get("layer_types") or ["full_attention"])
    if layer_types != {"full_attention"}:
        raise ModelError(
            f"This {architecture} has layers of type {', '.join(sorted(layer_types))}; only full_attention works."
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"This {architecture} is quantized ({method}), which is not supported; use its float weights.")


def _rope_config(config: dict[str, Any]) -> RopeConfig:
    """transformers 5 writes `rope_parameters`, earlier versions `rope_theta` and `rope_scaling`."""
    parameters = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **(config.get("rope_scaling") or {}),
    }
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in SUPPORTED_ROPE_TYPES:
        raise ModelError(f"Rope type '{rope_type}' is not supported. Supported: {', '.join(SUPPORTED_ROPE_TYPES)}.")
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelError("A partial rotary embedding (partial_rotary_factor) is not supported, only a full one.")
    return RopeConfig(
        theta=float(parameters.get("rope_theta", config.get("rope_theta", 10000.0))),
        rope_type=rope_type,
        factor=float(parameters["factor"]) if rope_type != "default" else 1.0,
        low_freq_factor=float(parameters["low_freq_factor"]) if rope_type == "llama3" else 1.0,
        high_freq_factor=float(parameters["high_freq_factor"]) if rope_type == "llama3" else 1.0,
        original_max_position_embeddings=int(
            parameters.get("original_max_position_embeddings", config["max_position_embeddings"])
        ),
    )


def _eos_token_ids(eos: int | list[int] | None) -> tuple[int, ...]:
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)
