"""The weights of a model: which tensors it needs, loaded from safetensors or drawn at random."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from blendserve.errors import ModelError
from blendserve.models.config import ModelConfig
from blendserve.models.linear import GatedLinear, Linear

_DUMMY_STD = 0.02

# Gives the tensor of a name in the expected shape.
TensorSource = Callable[[str, tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. H hidden, I intermediate, Q = num_heads * head_dim, K = num_kv_heads * head_dim."""

    input_norm: torch.Tensor  # [H]
    qkv: Linear  # H → Q + 2 K
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None  # [head_dim]
    output: Linear  # Q → H
    post_attention_norm: torch.Tensor  # [H]
    gate_up: GatedLinear  # H → I
    down: Linear  # I → H


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All weights. With tied embeddings `head` multiplies by `embedding`, which is [vocab_size, H]."""

    embedding: torch.Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor
    head: Linear  # H → vocab_size


def load_weights(
    folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device, *, is_batch_invariant: bool = False
) -> ModelWeights:
    """Read the *.safetensors in `folder`. Raises ModelError for a tensor that is missing or of another shape.

    is_batch_invariant: as for `Linear`.
    """
    with ExitStack() as stack:
        files = {}
        try:
            for path in sorted(folder.glob("*.safetensors")):
                if not os.access(path, os.R_OK):  # safetensors would say that there is no such file
                    raise ModelError(f"{path} may not be read by this user. Give it the right to.")
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

        return _build(config, tensor, is_batch_invariant)


def dummy_weights(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_batch_invariant: bool = False,
) -> ModelWeights:
    """Random weights, the same every time, normal with standard deviation 0.02, norms 1: for benchmarks, no files
    needed.
    """
    generator = torch.Generator(device=device).manual_seed(0)

    def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, _DUMMY_STD, generator=generator)

    return _build(config, tensor, is_batch_invariant)


def _build(config: ModelConfig, tensor: TensorSource, is_batch_invariant: bool) -> ModelWeights:
    shape = (config.vocab_size, config.hidden_size)
    embedding = tensor("model.embed_tokens.weight", shape)
    head = embedding if config.tie_word_embeddings else tensor("lm_head.weight", shape)
    prefixes = [f"model.layers.{index}." for index in range(config.num_layers)]
    return ModelWeights(
        embedding=embedding,
        layers=tuple(_layer(config, tensor, prefix, is_batch_invariant) for prefix in prefixes),
        final_norm=tensor("model.norm.weight", (config.hidden_size,)),
        head=Linear(head, is_batch_invariant=is_batch_invariant),
    )


def _layer(config: ModelConfig, tensor: TensorSource, prefix: str, is_batch_invariant: bool) -> LayerWeights:
    hidden, intermediate, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    query, key = config.num_heads * head_dim, config.num_kv_heads * head_dim

    def fused(parts: dict[str, int], in_features: int, has_bias: bool) -> Linear:
        """One product for several of the same input, named with how many features each puts out."""
        weights = [tensor(f"{prefix}{name}.weight", (rows, in_features)) for name, rows in parts.items()]
        biases = [tensor(f"{prefix}{name}.bias", (rows,)) for name, rows in parts.items() if has_bias]
        bias = torch.cat(biases) if has_bias else None
        return Linear(torch.cat(weights), bias, is_batch_invariant=is_batch_invariant)

    def norm(name: str, size: int) -> torch.Tensor:
        return tensor(f"{prefix}{name}.weight", (size,))

    qkv = {"self_attn.q_proj": query, "self_attn.k_proj": key, "self_attn.v_proj": key}
    gate, up = f"{prefix}mlp.gate_proj", f"{prefix}mlp.up_proj"
    mlp_biases = [tensor(f"{name}.bias", (intermediate,)) for name in (gate, up) if config.has_mlp_bias]
    return LayerWeights(
        input_norm=norm("input_layernorm", hidden),
        qkv=fused(qkv, hidden, config.has_qkv_bias),
        q_norm=norm("self_attn.q_norm", head_dim) if config.has_qk_norm else None,
        k_norm=norm("self_attn.k_norm", head_dim) if config.has_qk_norm else None,
        output=fused({"self_attn.o_proj": hidden}, query, config.has_output_bias),
        post_attention_norm=norm("post_attention_layernorm", hidden),
        gate_up=GatedLinear(
            tensor(f"{gate}.weight", (intermediate, hidden)),
            tensor(f"{up}.weight", (intermediate, hidden)),
            torch.cat(mlp_biases) if mlp_biases else None,
            is_batch_invariant=is_batch_invariant,
        ),
        down=fused({"mlp.down_proj": hidden}, intermediate, config.has_mlp_bias),
    )
