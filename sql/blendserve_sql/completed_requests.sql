-- The requests that have run already, in a shard or in the sample; failed ones may run again. One that the sample's own
-- limit cut off isn't final: it still has to run to its end.
with

completions as (

    select
        row_index,
        finish_reason,
        num_completion_tokens
    from completions

),

tokenized_requests as (

    select
        row_index,
        max_tokens
    from tokenized_requests

),

attempts as (

    select
        completions.row_index,
        completions.finish_reason,
        completions.num_completion_tokens,
        completions.finish_reason <> 'length'
        or completions.num_completion_tokens >= tokenized_requests.max_tokens as is_final
    from completions
    inner join tokenized_requests
        on completions.row_index = tokenized_requests.row_index
    where completions.finish_reason <> 'error'

),

final as (

    select *
    from attempts
    qualify row_number() over (partition by row_index order by is_final desc, num_completion_tokens desc) = 1

)

select * from final
