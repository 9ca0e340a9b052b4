-- The rows of a Parquet file in lexical order of their prompts' token ids: a depth-first walk of the prefix tree.
-- file_position is the row's place in the file, by which its tokens are found again. Equal prompts come in any order:
-- a second key to sort by would double the time.
with

prompts as (

    select
        file_row_number as file_position,
        prompt_token_ids
    from read_parquet($prompts, file_row_number = true)

),

final as (

    select file_position
    from prompts
    order by prompt_token_ids asc

)

select * from final
