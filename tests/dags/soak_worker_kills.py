"""Twenty GPU workers in a row are killed with -9 in mid-shard, at random moments. `make test` kills fewer.

pytest --log-cli-level INFO tests/dags/soak_worker_kills.py
"""

from __future__ import annotations

import logging
import random

import pytest

from tests.dags.airflow_cluster import AirflowCluster
from tests.dags.long_runs import LongRun

pytestmark = pytest.mark.timeout(1800)

NUM_KILLS = 20
NUM_ROWS = 400

log = logging.getLogger(__name__)


def test_twenty_lost_workers_lose_and_double_nothing(cluster: AirflowCluster) -> None:
    run = LongRun(cluster, "soaked", NUM_ROWS)
    seed = random.randrange(2**32)
    log.info("seed %d", seed)
    drawn = random.Random(seed)
    kept = [run.kill_in_mid_shard(drawn, within_seconds=3.0) for _ in range(NUM_KILLS)]
    log.info("completions after each kill: %s", kept)
    assert kept == sorted(set(kept)), "each attempt got further than the one before"
    cluster.wait_for_run(run.url, "success", seconds=600)
    run.check_that_every_row_came_out_once()
    assert sorted(run.written_rows()) == list(range(NUM_ROWS)), "no finished row ran again"
