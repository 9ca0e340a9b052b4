-- Every request with its place in the sorted order and, where asked for, the earlier request that answers it too.
-- neighbours: the requests in lexical order of their tokens, with their places in it and the tokens that each shares
-- with the one before.
with

neighbours as (

    select
        sort_position,
        row_index,
        num_prompt_tokens,
        max_tokens,
        shared_prefix_tokens
    from neighbours

),

compared as (

    select
        *,
        sort_position > 0
        and shared_prefix_tokens = num_prompt_tokens
        and num_prompt_tokens = lag(num_prompt_tokens) over (order by sort_position) as is_same_prompt
    from neighbours

),

grouped as (

    select
        *,
        sum(case when is_same_prompt then 0 else 1 end) over (
            order by sort_position
            rows between unbounded preceding and current row
        ) as prompt_group
    from compared

),

answered as (

    select
        *,
        min(row_index) over (partition by prompt_group, max_tokens) as answering_row_index
    from grouped

),

final as (

    select
        sort_position,
        row_index,
        num_prompt_tokens,
        shared_prefix_tokens,
        case when $dedupe and answering_row_index <> row_index then answering_row_index end as duplicate_of
    from answered
    order by sort_position asc

)

select * from final
