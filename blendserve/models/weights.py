"""The weights of a model: which tensors it needs, loaded from safetensors or drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from blendserve.errors import ModelError
from blendserve.models.config import ModelConfig

_DUMMY_STD = 0.02

# Gives the tensor of a name in the expected shape.
TensorSource = Callable[[str, tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. H hidden, I intermediate, Q = num_heads * head_dim, K = num_kv_heads * head_dim."""

    input_norm: torch.Tensor  # [H]
    qkv: torch.Tensor  # [Q + 2 K, H]
    qkv_bias: torch.Tensor | None  # [Q + 2 K]
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None  # [head_dim]
    output: torch.Tensor  # [H, Q]
    output_bias: torch.Tensor | None  # [H]
    post_attention_norm: torch.Tensor  # [H]
    gate_up: torch.Tensor  # [2 I, H]
    gate_up_bias: torch.Tensor | None  # [2 I]
    down: torch.Tensor  # [H, I]
    down_bias: torch.Tensor | None  # [H]


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All weights. With tied embeddings `head` is the same tensor as `embedding`, both [vocab_size, H]."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: torch.Tensor


def load_weights(folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """Read the *.safetensors in `folder`. Raises ModelError for a tensor that is missing or of another shape."""
    with ExitStack() as stack:
        files = {}
        try:
            for path in sorted(folder.glob("*.safetensors")):
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                files.update(dict.fromkeys(file.keys(), file))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} can't be read as safetensors: {error}. Fetch the file again.") from error

        def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
            if name not in files:
                raise ModelError(f"Weights in {folder} lack '{name}', which a {config.architecture} needs.")
            found: torch.Tensor = files[name].get_tensor(name)
            if tuple(found.shape) != shape:
                raise ModelError(
                    f"Weight '{name}' in {folder}: expected shape {shape} by config.json, got {tuple(found.shape)}."
                )
            return found.to(dtype=dtype, device=device)

        return _build(config, tensor)


def dummy_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> ModelWeights:
    """Random weights, normal with standard deviation 0.02, norms 1: for benchmarks, no files needed."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, _DUMMY_STD, generator=generator)

    return _build(config, tensor)


def _build(config: ModelConfig, tensor: TensorSource) -> ModelWeights:
    embedding = tensor("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
    head = (
        embedding if config.tie_word_embeddings else tensor("lm_head.weight", (config.vocab_size, config.hidden_size))
    )
    return ModelWeights(
        embedding=embedding,
        layers=tuple(_layer(config, tensor, f"model.layers.{index}.") for index in range(config.num_layers)),
        final_norm=tensor("model.norm.weight", (config.hidden_size,)),
        head=head,
    )


def _layer(config: ModelConfig, tensor: TensorSource, prefix: str) -> LayerWeights:
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_heads * head_dim, config.num_kv_heads * head_dim

    def fused(names: tuple[str, ...], rows: tuple[int, ...]) -> torch.Tensor:
        return torch.cat([tensor(f"{prefix}{name}.weight", (n, hidden)) for name, n in zip(names, rows, strict=True)])

    def bias(is_present: bool, names: tuple[str, ...], rows: tuple[int, ...]) -> torch.Tensor | None:
        if not is_present:
            return None
        return torch.cat([tensor(f"{prefix}{name}.bias", (n,)) for name, n in zip(names, rows, strict=True)])

    def norm(name: str, size: int) -> torch.Tensor:
        return tensor(f"{prefix}{name}.weight", (size,))

    qkv, qkv_rows = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (query, key, key)
    gate_up, gate_up_rows = ("mlp.gate_proj", "mlp.up_proj"), (intermediate, intermediate)
    return LayerWeights(
        input_norm=norm("input_layernorm", hidden),
        qkv=fused(qkv, qkv_rows),
        qkv_bias=bias(config.has_qkv_bias, qkv, qkv_rows),
        q_norm=norm("self_attn.q_norm", head_dim) if config.has_qk_norm else None,
        k_norm=norm("self_attn.k_norm", head_dim) if config.has_qk_norm else None,
        output=tensor(f"{prefix}self_attn.o_proj.weight", (hidden, query)),
        output_bias=bias(config.has_output_bias, ("self_attn.o_proj",), (hidden,)),
        post_attention_norm=norm("post_attention_layernorm", hidden),
        gate_up=fused(gate_up, gate_up_rows),
        gate_up_bias=bias(config.has_mlp_bias, gate_up, gate_up_rows),
        down=tensor(f"{prefix}mlp.down_proj.weight", (hidden, intermediate)),
        down_bias=bias(config.has_mlp_bias, ("mlp.down_proj",), (hidden,)),
    )
