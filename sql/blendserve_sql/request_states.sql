-- Every sorted request with what is known of its output and whether it still has to run.
with

sorted_requests as (

    select
        sort_position,
        row_index,
        num_prompt_tokens,
        shared_prefix_tokens,
        duplicate_of
    from sorted_requests

),

tokenized_requests as (

    select
        file_row_number as file_position,
        row_index,
        request_id,
        max_tokens,
        output_tokens_hint
    from tokenized_requests

),

final as (

    select
        sorted_requests.sort_position,
        sorted_requests.row_index,
        tokenized_requests.file_position,
        tokenized_requests.request_id,
        sorted_requests.num_prompt_tokens,
        sorted_requests.shared_prefix_tokens,
        tokenized_requests.max_tokens,
        tokenized_requests.output_tokens_hint,
        completed_requests.num_completion_tokens,
        coalesce(completed_requests.finish_reason = 'length', false) as is_cut_off,
        sorted_requests.duplicate_of is not null as is_duplicate,
        coalesce(completed_requests.is_final, false) as is_completed,
        coalesce(not completed_requests.is_final, false) as is_begun
    from sorted_requests
    inner join tokenized_requests
        on sorted_requests.row_index = tokenized_requests.row_index
    left join completed_requests
        on sorted_requests.row_index = completed_requests.row_index
    order by sorted_requests.sort_position asc

)

select * from final
