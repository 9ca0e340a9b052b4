-- Request ids that more than one row has: an id has to name one row, or results can't be joined back.
with requests as (
    select
        request_id,
        row_index
    from requests
),

final as (
    select
        request_id,
        min(row_index) as first_row_index,
        max(row_index) as last_row_index,
        count(*) as num_rows
    from requests
    group by request_id
    having count(*) > 1
)

select * from final
order by first_row_index
limit 5
