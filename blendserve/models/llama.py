"""The Llama decoder, which all supported architectures are but for biases and q/k norms.

Knows nothing of requests or scheduling: a ragged batch and a paged KV cache go in, hidden states and logits come out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import embedding

from blendserve.models.batch import ModelBatch
from blendserve.models.config import ModelConfig
from blendserve.models.rotary_table import rotary_table
from blendserve.models.weights import LayerWeights, ModelWeights
from blendserve_kernels.decode_attention import decode_attention, plan_decode
from blendserve_kernels.prefill_attention import plan_prefill, prefill_attention
from blendserve_kernels.rms_norm import add_rms_norm, rms_norm
from blendserve_kernels.rotary import rotary_and_store_kv

if TYPE_CHECKING:
    from blendserve_kernels.triton_kernels.decode_attention import DecodePlan
    from blendserve_kernels.triton_kernels.prefill_attention import PrefillPlan

    Plans = tuple[DecodePlan | None, PrefillPlan | None]

# K and V of one layer, each [num_blocks, num_kv_heads, block_size, head_dim].
LayerCache = tuple[torch.Tensor, torch.Tensor]


class LlamaModel:
    """A decoder with its weights, on one device."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, max_model_len: int) -> None:
        self.config = config
        self._weights = weights
        self._scale = config.head_dim**-0.5
        self._rotary_table = rotary_table(config.rope, config.head_dim, max_model_len, weights.embedding.device)

    @property
    def device(self) -> torch.device:
        return self._weights.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self._weights.embedding.dtype

    def forward(self, batch: ModelBatch, kv_cache: list[LayerCache]) -> torch.Tensor:
        """What the head turns into logits, [num_outputs, H]; stores K and V of all T tokens."""
        layers, eps, programs = self._weights.layers, self.config.rms_norm_eps, batch.product_programs
        plans = self._plans(batch, kv_cache[0][0])
        residual = embedding(batch.token_ids, self._weights.embedding)  # [T, H]
        normed = rms_norm(residual, layers[0].input_norm, eps)
        for index, layer in enumerate(layers):
            is_last = index + 1 == len(layers)
            attended = self._attention(layer, normed, batch, kv_cache[index], plans)
            if is_last and batch.outputs is not None:
                # What follows works on each token alone, so from here on only these matter.
                attended, residual = attended[batch.outputs], residual[batch.outputs]
            projected = layer.output(attended, programs)
            normed, residual = add_rms_norm(projected, residual, layer.post_attention_norm, eps)
            fed_forward = layer.down(layer.gate_up(normed, programs), programs)
            next_norm = self._weights.final_norm if is_last else layers[index + 1].input_norm
            normed, residual = add_rms_norm(fed_forward, residual, next_norm, eps)
        return normed

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_sampled, H], rows of what `forward` returns → [num_sampled, vocab_size]."""
        return self._weights.head(hidden)

    def _plans(self, batch: ModelBatch, k_cache: torch.Tensor) -> Plans:
        """The work lists of both kinds of attention, which all layers share."""
        decode, prefill, num_heads = batch.decode, batch.prefill, self.config.num_heads
        return (
            plan_decode(k_cache, decode.block_table, decode.context_lens, num_heads, decode.num_programs)
            if decode
            else None,
            plan_prefill(k_cache, prefill.cu_seqlens_q, prefill.context_lens, len(batch.token_ids), num_heads)
            if prefill
            else None,
        )

    def _attention(
        self, layer: LayerWeights, normed: torch.Tensor, batch: ModelBatch, cache: LayerCache, plans: Plans
    ) -> torch.Tensor:
        """[T, num_heads * head_dim]: what the heads gather, not yet projected. Stores K and V of all T tokens first."""
        config, head_dim = self.config, self.config.head_dim
        query_size, key_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        qkv = layer.qkv(normed, batch.product_programs)  # [T, (num_heads + 2 num_kv_heads) * head_dim]
        q, k, v = torch.split(qkv, [query_size, key_size, key_size], dim=-1)
        q, k = self._normed_heads(q, layer.q_norm), self._normed_heads(k, layer.k_norm)
        v = v.reshape(-1, config.num_kv_heads, head_dim)
        k_cache, v_cache = cache
        q = rotary_and_store_kv(q, k, v, batch.positions, self._rotary_table, k_cache, v_cache, batch.slot_mapping)
        return self._attend(q, batch, k_cache, v_cache, plans).flatten(1)

    def _normed_heads(self, heads: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """[T, n * head_dim] → [T, n, head_dim], each head normed where the architecture does so (Qwen3)."""
        num_tokens, head_dim = heads.shape[0], self.config.head_dim
        if weight is not None:
            heads = rms_norm(heads.reshape(-1, head_dim), weight, self.config.rms_norm_eps)
        return heads.reshape(num_tokens, -1, head_dim)

    def _attend(
        self,
        q: torch.Tensor,
        batch: ModelBatch,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        plans: Plans,
    ) -> torch.Tensor:
        """[T, num_heads, head_dim]: decodes and prefill chunks each by their own kernel; padding stays undefined."""
        out = torch.empty_like(q)
        if batch.decode is not None:
            part = batch.decode
            rows = slice(part.context_lens.shape[0])
            decode_attention(
                q[rows],
                k_cache,
                v_cache,
                part.block_table,
                part.context_lens,
                self._scale,
                plan=plans[0],
                out=out[rows],
            )
        if batch.prefill is not None:  # after the decodes, whose padding may overlap the chunks
            chunks = batch.prefill
            prefill_attention(
                q,
                k_cache,
                v_cache,
                chunks.block_table,
                chunks.cu_seqlens_q,
                chunks.context_lens,
                self._scale,
                chunks.max_seqlen_q,
                plan=plans[1],
                out=out,
            )
        return out
