"""From scheduled requests to completions: scheduler, paged KV cache, model runner. No DuckDB, no Airflow."""
