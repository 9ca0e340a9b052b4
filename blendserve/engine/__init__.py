"""From scheduled requests to completions: scheduler, paged KV cache, model runner. No DuckDB, no Airflow."""

import os

# Before torch loads its thread pool: threads that spin while they wait for each other make a step ten times slower as
# soon as another process wants a core, and sleeping instead costs nothing that shows.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
