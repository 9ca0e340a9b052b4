"""### Example: use the results of a batch

Runs whenever a batch finishes. The asset's event says how many rows there are, how many failed, and where they lie.
"""

from __future__ import annotations

import logging
from typing import Any

from airflow.sdk import DAG, Asset, task

RESULTS = Asset("blendserve_results")

with DAG(dag_id="blendserve_consumer_example", doc_md=__doc__, schedule=[RESULTS], tags=["blendserve", "example"]):

    @task
    def count_finish_reasons(triggering_asset_events: Any = None) -> dict[str, int]:
        """How many completions ended for which reason, over all batches that triggered this run."""
        from collections import Counter

        import pyarrow.parquet as pq

        counts: Counter[str] = Counter()
        for event in triggering_asset_events[RESULTS]:
            results = pq.read_table(event.extra["path"], columns=["finish_reason"])
            counts.update(results["finish_reason"].to_pylist())
        logging.getLogger(__name__).info("finish reasons: %s", dict(counts))
        return dict(counts)

    count_finish_reasons()
