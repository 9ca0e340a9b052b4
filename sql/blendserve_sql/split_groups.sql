-- The prompts whose place isn't settled yet, group by group in lexical order of the tokens after those that a group
-- shares.
-- unsettled: the place that a prompt has so far, its group, its branch (by what it shares with one of the group), the
-- next tokens, and how many are left, by which a prompt's end is told from the least token. Equal prompts stay in the
-- order that they have.
with

unsettled as (

    select
        place,
        group_number,
        branch,
        token_0,
        token_1,
        token_2,
        token_3,
        num_tokens_left
    from unsettled

),

final as (

    select place
    from unsettled
    order by
        group_number asc,
        branch asc,
        token_0 asc,
        token_1 asc,
        token_2 asc,
        token_3 asc,
        num_tokens_left asc,
        place asc

)

select * from final
