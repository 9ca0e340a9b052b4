-- One row per input row, in input order: its completion, or why it has none.
-- outcome: succeeded, failed, rejected, duplicate (answered by an equal request's completion), missing (not run yet) or
-- mixed up (the completion is of a request with another id, so not of this job).
with requests as (
    select
        row_index,
        request_id
    from requests
),

rejected_requests as (
    select
        row_index,
        error
    from rejected_requests
),

duplicates as (
    select
        row_index,
        duplicate_of
    from sorted_requests
    where duplicate_of is not null
),

limits as (
    select
        row_index,
        max_tokens
    from tokenized_requests
),

-- A row that failed in one attempt may have succeeded in a later one; the success counts. What the sample's own limit
-- cut off is no result.
best_completions as (
    select
        completions.*,
        completions.request_id <> requests.request_id as is_of_another_request
    from completions
    inner join requests on completions.row_index = requests.row_index
    inner join limits on completions.row_index = limits.row_index
    where completions.finish_reason <> 'length' or completions.num_completion_tokens >= limits.max_tokens
    qualify
        row_number() over (
            partition by completions.row_index
            order by completions.finish_reason = 'error', completions.num_completion_tokens desc
        ) = 1
),

joined as (
    select
        requests.row_index,
        requests.request_id,
        best_completions.completion,
        rejected_requests.error as rejection,
        best_completions.error as failure,
        best_completions.finish_reason,
        best_completions.num_prompt_tokens,
        best_completions.num_completion_tokens,
        duplicates.row_index is not null as is_duplicate,
        -- nothing of a duplicate's prompt was computed: all of it was found done
        if(
            duplicates.row_index is not null,
            best_completions.num_prompt_tokens,
            best_completions.num_cached_tokens
        ) as num_cached_tokens,
        case
            when rejected_requests.row_index is not null then 'rejected'
            when best_completions.row_index is null then 'missing'
            when best_completions.is_of_another_request then 'mixed up'
            when best_completions.finish_reason = 'error' then 'failed'
            when duplicates.row_index is not null then 'duplicate'
            else 'succeeded'
        end as outcome
    from requests
    left join rejected_requests on requests.row_index = rejected_requests.row_index
    left join duplicates on requests.row_index = duplicates.row_index
    left join best_completions on best_completions.row_index = coalesce(duplicates.duplicate_of, requests.row_index)
),

final as (
    select
        row_index,
        request_id,
        completion,
        case outcome
            when 'rejected' then 'rejected'
            when 'missing' then 'error'
            else finish_reason
        end as finish_reason,
        case outcome
            when 'rejected' then rejection
            when 'missing' then 'the shard of this request did not finish'
            else failure
        end as error,
        num_prompt_tokens,
        num_cached_tokens,
        num_completion_tokens,
        outcome
    from joined
)

select * from final
order by row_index
