"""From tokenized requests to a plan: prefix tree, costs, order, shards. DuckDB and NumPy; no torch, no Airflow."""
