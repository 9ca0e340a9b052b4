"""From scheduled requests to completions: scheduler, paged KV cache, model runner. Knows torch, no DuckDB, no Airflow."""
