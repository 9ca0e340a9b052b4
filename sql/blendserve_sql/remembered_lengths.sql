-- Mean and mean square output length of every request as earlier runs saw them: of its class, or else of all requests
-- with prompts about as long; null where there is neither.
with

by_length as (

    select
        length_class,
        sum(output_tokens) / sum(num_requests) as mean_output_tokens,
        sum(output_tokens_squared) / sum(num_requests) as mean_square_output_tokens
    from earlier_runs
    group by length_class

),

final as (

    select
        request_classes.row_index,
        coalesce(earlier_runs.output_tokens / earlier_runs.num_requests, by_length.mean_output_tokens)
            as mean_output_tokens,
        coalesce(earlier_runs.output_tokens_squared / earlier_runs.num_requests, by_length.mean_square_output_tokens)
            as mean_square_output_tokens
    from request_classes
    left join earlier_runs
        on
            request_classes.prompt_begin = earlier_runs.prompt_begin
            and request_classes.length_class = earlier_runs.length_class
    left join by_length
        on request_classes.length_class = by_length.length_class
    order by request_classes.row_index asc

)

select * from final
