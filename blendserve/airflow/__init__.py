"""BlendServe in Airflow: operators and a task group. Importing it costs no torch, DuckDB or pyarrow."""
