-- Output lengths by class of request: those of earlier runs, which count less, and those of the finished requests.
with

finished as (

    select
        request_classes.prompt_begin,
        request_classes.length_class,
        cast(completed_requests.num_completion_tokens as double) as output_tokens
    from completed_requests
    inner join request_classes
        on completed_requests.row_index = request_classes.row_index
    where completed_requests.is_final

),

seen as (

    select
        prompt_begin,
        length_class,
        1.0 as weight,
        output_tokens,
        output_tokens * output_tokens as output_tokens_squared
    from finished
    union all
    select
        prompt_begin,
        length_class,
        num_requests * $remembered as weight,
        output_tokens * $remembered as output_tokens,
        output_tokens_squared * $remembered as output_tokens_squared
    from earlier_runs

),

final as (

    select
        prompt_begin,
        length_class,
        sum(weight) as num_requests,
        sum(output_tokens) as output_tokens,
        sum(output_tokens_squared) as output_tokens_squared
    from seen
    group by prompt_begin, length_class
    having sum(weight) >= $least_requests
    order by sum(weight) desc, prompt_begin asc, length_class asc
    limit $most_classes

)

select * from final
