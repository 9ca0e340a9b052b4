-- What a request's output length may depend on, comparable between runs: how its prompt begins after what all prompts
-- share, and the power of two above its length.
with

tokenized_requests as (

    select
        row_index,
        num_prompt_tokens,
        prompt_token_ids
    from tokenized_requests

),

final as (

    select
        row_index,
        md5(
            cast(list_slice(prompt_token_ids, $num_shared + 1, $num_shared + $num_compared) as varchar)
        ) as prompt_begin,
        cast(floor(log2(greatest(num_prompt_tokens, 1))) as bigint) + 1 as length_class
    from tokenized_requests

)

select * from final
