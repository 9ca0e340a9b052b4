-- Compute and memory time of each request, from its lengths and the seconds per unit of work.
--
-- expected_lengths: prompt tokens, how many of them the request before it has computed already, and the mean and mean
-- square of the output length (T_mem is convex in the length: a mean alone would be biased).
-- Sharing discounts the prefill only. The first output token comes out of the prefill, so that d output tokens take
-- d - 1 decode steps; the i-th of them reads the prompt and i tokens. What a request stores in the KV cache it
-- writes once: that is the least memory time, and the only one of a request with one output token.
-- With a shared-prefix decode kernel $prefix_readers requests read a shared prefix together; otherwise it is 1.
with

expected_lengths as (

    select
        row_index,
        num_prompt_tokens::double as prompt_tokens,
        shared_prefix_tokens::double as shared_tokens,
        mean_output_tokens as output_tokens,
        greatest(mean_output_tokens - 1, 0) as decode_steps,
        greatest(mean_square_output_tokens - mean_output_tokens, 0) / 2 as decode_step_sum
    from expected_lengths

),

work as (

    select
        row_index,
        output_tokens as sampled_tokens,
        prompt_tokens - shared_tokens + decode_steps as layer_tokens,
        (prompt_tokens * prompt_tokens - shared_tokens * shared_tokens) / 2 as attended_pairs,
        decode_steps * (prompt_tokens - shared_tokens * (1 - 1 / $prefix_readers)) + decode_step_sum as kv_tokens_read
    from expected_lengths

),

seconds as (

    select
        row_index,
        layer_tokens * $seconds_per_layer_token
        + sampled_tokens * $seconds_per_sampled_token
        + attended_pairs * $seconds_per_attended_pair as compute_seconds,
        greatest(kv_tokens_read, layer_tokens, 1) * $seconds_per_kv_token as memory_seconds
    from work

),

final as (

    select
        row_index,
        compute_seconds,
        memory_seconds,
        compute_seconds / memory_seconds as density
    from seconds

)

select * from final
