"""The torch twins against formulas written down independently."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from blendserve_kernels import reference
from blendserve_kernels.decode_attention import decode_attention
from blendserve_kernels.prefill_attention import prefill_attention
from blendserve_kernels.rms_norm import add_rms_norm, rms_norm
from blendserve_kernels.rotary import rotary_and_store_kv
from blendserve_kernels.sampling import sample
from blendserve_kernels.silu_and_multiply import silu_and_multiply
from tests.kernels.paged_requests import make_paged_requests, plain_attention

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_transformers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 63, 576).to(dtype)
    norm = LlamaRMSNorm(576, eps=1e-5).to(dtype)
    norm.weight.data.normal_()
    assert torch.equal(rms_norm(x, norm.weight.data, 1e-5), norm(x).detach())
    out, residual_out = add_rms_norm(x, residual, norm.weight.data, 1e-5)
    assert torch.equal(residual_out, x + residual)
    assert torch.equal(out, norm(x + residual).detach())


def test_silu_and_multiply_equals_its_formula() -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(7, 2 * 33)
    gate, up = gate_up[:, :33], gate_up[:, 33:]
    torch.testing.assert_close(silu_and_multiply(gate_up), gate * torch.sigmoid(gate) * up)


def test_rotary_and_store_kv_equals_transformers() -> None:
    torch.manual_seed(0)
    num_tokens, num_heads, num_kv_heads, head_dim, block_size = 9, 6, 2, 64, 4
    config = LlamaConfig(hidden_size=num_heads * head_dim, num_attention_heads=num_heads, head_dim=head_dim)
    positions = torch.randint(0, 200, (num_tokens,))
    all_cos, all_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(200)[None])
    cos_sin = torch.cat([all_cos[0, :, : head_dim // 2], all_sin[0, :, : head_dim // 2]], dim=-1).contiguous()
    q = torch.randn(num_tokens, num_heads, head_dim)
    k, v = torch.randn(2, num_tokens, num_kv_heads, head_dim)
    k_cache, v_cache = torch.full((2, 5, num_kv_heads, block_size, head_dim), torch.nan)
    slots = torch.tensor([17, 0, 3, -1, 9, 12, -1, 19, 5])
    q_out = rotary_and_store_kv(q, k, v, positions, cos_sin, k_cache, v_cache, slots)

    expected_q, expected_k = apply_rotary_pos_emb(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], all_cos[:, positions], all_sin[:, positions]
    )
    torch.testing.assert_close(q_out, expected_q[0].transpose(0, 1))
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            stored_k = k_cache[slot // block_size, :, slot % block_size]
            torch.testing.assert_close(stored_k, expected_k[0, :, token])
            assert torch.equal(v_cache[slot // block_size, :, slot % block_size], v[token])
    assert int((~k_cache.isnan()).sum()) == int((slots >= 0).sum()) * num_kv_heads * head_dim


@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_decode_attention_equals_plain_attention(group_size: int) -> None:
    torch.manual_seed(0)
    lengths = [1, 15, 16, 0, 17, 100, 700, 512, 333, 31]
    requests = make_paged_requests(lengths, num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.float32, device=CPU)
    q = torch.randn(len(lengths), 2 * group_size, 64)
    out = decode_attention(q, requests.k_cache, requests.v_cache, requests.block_table, requests.context_lens, 0.125)
    for b, length in enumerate(lengths):
        expected = plain_attention(q[b : b + 1], requests.keys[b], requests.values[b], 0.125)[0]
        torch.testing.assert_close(out[b].double(), expected if length else torch.zeros_like(expected), **CLOSE)


def test_decode_attention_splits_a_batch_that_exceeds_the_gather_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    requests = make_paged_requests(
        [40, 41, 39, 40, 38], num_kv_heads=2, head_dim=16, block_size=8, dtype=torch.float32, device=CPU
    )
    q = torch.randn(5, 4, 16)
    arguments = (q, requests.k_cache, requests.v_cache, requests.block_table, requests.context_lens, 0.25)
    whole = decode_attention(*arguments)
    monkeypatch.setattr(reference, "_MAX_GATHERED_ELEMENTS", 2 * 48 * 2 * 16)
    torch.testing.assert_close(decode_attention(*arguments), whole)


@pytest.mark.parametrize("group_size", [1, 3])
def test_prefill_attention_equals_plain_attention(group_size: int) -> None:
    torch.manual_seed(0)
    context_lens, chunk_lens = [1, 15, 16, 17, 100, 70, 512, 9], [1, 15, 7, 2, 100, 64, 511, 0]
    requests = make_paged_requests(
        context_lens, num_kv_heads=2, head_dim=64, block_size=16, dtype=torch.float32, device=CPU
    )
    cu_seqlens_q = torch.tensor([0, *chunk_lens]).cumsum(0).to(torch.int32)
    q = torch.randn(sum(chunk_lens), 2 * group_size, 64)
    out = prefill_attention(
        q,
        requests.k_cache,
        requests.v_cache,
        requests.block_table,
        cu_seqlens_q,
        requests.context_lens,
        0.125,
        max(chunk_lens),
    )
    for b in range(len(context_lens)):
        chunk = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
        expected = plain_attention(q[chunk], requests.keys[b], requests.values[b], 0.125)
        torch.testing.assert_close(out[chunk].double(), expected, **CLOSE)


def _sample(logits: torch.Tensor, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0) -> torch.Tensor:  # type: ignore[no-untyped-def]
    rows = logits.shape[0]
    return sample(
        logits,
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        torch.full((rows,), seed),
        torch.arange(rows),
    )


def _expected_distribution(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float):  # type: ignore[no-untyped-def]
    """The kept tokens by a full sort, one rule after the other."""
    probabilities, order = (logits / temperature).double().softmax(dim=-1).sort(descending=True)
    if top_k:
        probabilities[top_k:] = 0
    probabilities = probabilities / probabilities.sum()
    probabilities = probabilities.where(probabilities.cumsum(0) - probabilities < top_p, 0)
    probabilities = probabilities.where(probabilities >= min_p * probabilities.max(), 0)
    return torch.zeros_like(probabilities).scatter(0, order, probabilities / probabilities.sum())


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.7, 0, 0.8, 0.0), (1.3, 12, 1.0, 0.0), (1.0, 20, 0.7, 0.0), (1.0, 0, 1.0, 0.1)],
)
@pytest.mark.parametrize("num_candidates", [8, 256])
def test_sample_draws_from_the_kept_distribution(
    temperature: float, top_k: int, top_p: float, min_p: float, num_candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_NUM_CANDIDATES", num_candidates)
    torch.manual_seed(0)
    logits, num_draws = torch.randn(1, 50) * 2, 20000
    ids = _sample(logits.expand(num_draws, -1), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = _expected_distribution(logits[0], temperature, top_k, top_p, min_p)
    observed = torch.bincount(ids, minlength=50) / num_draws
    assert torch.all(observed[expected == 0] == 0)
    standard_error = (expected * (1 - expected) / num_draws).sqrt()
    assert torch.all((observed - expected).abs() <= 5 * standard_error)


def test_sample_of_a_seed_and_position_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 1000)
    whole = _sample(logits, top_p=0.9, seed=7)
    for row in range(6):
        alone = sample(
            logits[row : row + 1],
            torch.ones(1),
            torch.zeros(1, dtype=torch.int32),
            torch.full((1,), 0.9),
            torch.zeros(1),
            torch.full((1,), 7),
            torch.tensor([row]),
        )
        assert alone.item() == whole[row].item()
    assert not torch.equal(whole, _sample(logits, top_p=0.9, seed=8))


def test_sample_at_temperature_zero_is_greedy_also_beside_others() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 300)
    temperature = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0])
    zeros = torch.zeros(5)
    ids = sample(
        logits,
        temperature,
        torch.zeros(5, dtype=torch.int32),
        torch.ones(5),
        zeros,
        torch.arange(5),
        torch.arange(5),
    )
    assert torch.equal(ids[temperature == 0], logits.argmax(dim=-1)[temperature == 0])


def test_uniform_is_flat_and_in_range() -> None:
    seeds = torch.tensor([0, 1, -1, 2**62]).repeat_interleave(5000)
    values = reference.uniform(seeds, torch.arange(5000).repeat(4)).double()
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, bins=20, min=0, max=1)
    assert torch.all((counts - 1000).abs() < 5 * 1000**0.5)
    # SplitMix64 started at 0 yields this number first; ours mixes it once more with the position.
    assert reference._mix(torch.tensor([-7046029254386353131])).item() == -2152535657050944081


CLOSE = {"rtol": 1e-5, "atol": 2e-6}
