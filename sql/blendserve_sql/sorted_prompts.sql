-- The requests in lexical order of their prompts' token ids: a depth-first walk of the prefix tree.
-- file_position is the row's place in the Parquet file, by which its tokens are found again.
with

tokenized_requests as (

    select
        file_row_number as file_position,
        row_index,
        prompt_token_ids,
        num_prompt_tokens,
        max_tokens
    from read_parquet($tokenized_requests, file_row_number = true)

),

final as (

    select
        file_position,
        row_index,
        num_prompt_tokens,
        max_tokens
    from tokenized_requests
    order by
        prompt_token_ids asc,
        row_index asc

)

select * from final
