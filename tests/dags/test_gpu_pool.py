"""The pool of the GPU tasks is there after the set-up, and the scheduler makes it again when somebody removed it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

SCRIPT = """
from types import SimpleNamespace
from airflow.models.pool import Pool
from blendserve.airflow.gpu_pool import on_starting

assert Pool.get_pool("gpu").slots == 1, "the set-up makes it"
Pool.create_or_update_pool("gpu", slots=3, description="", include_deferred=False)
on_starting(SimpleNamespace(job_type="SchedulerJob"))
assert Pool.get_pool("gpu").slots == 3, "an existing pool stays as it is"
Pool.delete_pool("gpu")
on_starting(SimpleNamespace(job_type="TriggererJob"))
on_starting(object())
assert Pool.get_pool("gpu") is None, "only the scheduler makes it"
on_starting(SimpleNamespace(job_type="SchedulerJob"))
assert Pool.get_pool("gpu").slots == 2
"""


def test_pool_is_made_once_and_never_changed(
    migrated_home: Path, own_environment: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(migrated_home, tmp_path / "airflow")
    environment = own_environment | {
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__BLENDSERVE__GPU_POOL_SLOTS": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
