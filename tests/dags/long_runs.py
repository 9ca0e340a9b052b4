"""A run that takes long enough to be interrupted, time and again."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from blendserve.job_folder import JobFolder
from tests.dags.airflow_cluster import AirflowCluster

NUM_TOKENS = 200


class LongRun:
    """A run of one shard whose engine does little at a time, so that each attempt finishes some of its rows."""

    def __init__(self, cluster: AirflowCluster, name: str, num_rows: int) -> None:
        self._cluster = cluster
        self.num_rows = num_rows
        self.job = cluster.workspace / name
        self._shard = self.job / "completions" / "shard-00000"
        self._interrupted = 0
        prompts = [f"number {number}" for number in range(num_rows)]
        rows = {"request_id": self._ids, "prompt": prompts}
        pq.write_table(pa.table(rows), cluster.workspace / f"{name}.parquet")
        params: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "max_num_seqs": 1, "shards": 1}
        answer = cluster.trigger("patient_batch", input=f"{name}.parquet", output=name, sample_fraction=0.0, **params)
        self.url = url_of(answer)
        self.run_id = answer.json()["dag_run_id"]

    def wait_for_progress(self, seconds: float = 150.0) -> None:
        """Until an attempt at the shard that was not interrupted yet has written completions."""
        self._cluster.wait_until(lambda: self.newest_attempt() > self._interrupted, seconds, every_seconds=0.1)

    def note_interruption(self) -> None:
        """The attempt that wrote last will not go on, or not for long."""
        self._interrupted = self.newest_attempt()

    def newest_attempt(self) -> int:
        """The newest attempt at the shard that has written completions; 0 before the first one. None may be through."""
        assert not (self._shard / "shard.json").exists(), "the shard is too short for this test"
        return max((int(part.name.split("-")[1]) for part in self._shard.glob("part-*")), default=0)

    def kill_in_mid_shard(self, drawn: random.Random, within_seconds: float = 1.0) -> int:
        """Kill the GPU worker and all that it started, at a random moment after its attempt wrote completions.

        Returns how many completions count then. A new worker is started.
        """
        self.wait_for_progress()
        time.sleep(drawn.uniform(0.0, within_seconds))
        self._cluster.signal_worker("gpu", signal.SIGKILL)
        self.note_interruption()
        self._cluster.start_worker("gpu")
        return self.num_completions()

    def engines(self) -> list[psutil.Process]:
        return engines_of(self.job)

    def num_completions(self) -> int:
        """How many completions count."""
        return sum(pq.read_metadata(part).num_rows for part in JobFolder(self.job).completion_files())

    def written_rows(self) -> list[int]:
        """The rows of all completions that any attempt wrote, counted or not."""
        return [row for part in self._shard.glob("part-*") for row in pq.read_table(part)["row_index"].to_pylist()]

    def check_that_every_row_came_out_once(self) -> None:
        """Once in the results, and once among the completions that count."""
        results = pq.read_table(self.job / "results")
        assert results["request_id"].to_pylist() == self._ids
        assert results["num_completion_tokens"].to_pylist() == [NUM_TOKENS] * self.num_rows
        counted = pa.concat_tables(pq.read_table(path) for path in JobFolder(self.job).completion_files())
        assert sorted(counted["row_index"].to_pylist()) == list(range(self.num_rows))

    @property
    def _ids(self) -> list[str]:
        return [f"row-{number}" for number in range(self.num_rows)]


def engines_of(job: Path) -> list[psutil.Process]:
    """The processes that run shards of the job in this folder."""
    words = ("blendserve.engine.run_shard", str(job))
    processes = [(process, " ".join(process.info["cmdline"] or ())) for process in psutil.process_iter(["cmdline"])]
    return [process for process, command in processes if all(word in command for word in words)]


def url_of(answer: httpx.Response) -> str:
    """The URL of the run that this answer says was triggered."""
    assert answer.status_code == 200, answer.text
    run = answer.json()
    return f"/api/v2/dags/{run['dag_id']}/dagRuns/{run['dag_run_id']}"
