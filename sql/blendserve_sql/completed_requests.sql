-- The requests that have their completion already, from every shard and from the sample; failed ones may run again.
with

completions as (

    select
        row_index,
        finish_reason,
        num_completion_tokens
    from read_parquet($completions)

),

final as (

    select
        row_index,
        any_value(finish_reason) as finish_reason,
        any_value(num_completion_tokens) as num_completion_tokens
    from completions
    where finish_reason <> 'error'
    group by row_index

)

select * from final
