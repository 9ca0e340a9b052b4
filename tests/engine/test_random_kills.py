"""A shard whose process is killed twenty times in a row, at moments drawn at random, loses and doubles nothing."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pyarrow.parquet as pq

from blendserve.engine.run_shard import main, run_shard
from blendserve.file_store import LocalStore
from blendserve.lease import counted_files
from blendserve.manifest import ShardManifest
from tests import forked
from tests.engine.engine_runs import make_prompts, stated_requests, write_plan

NUM_KILLS = 20
NUM_REQUESTS = 1500
SIGNS = (None, "leases/*.json", "part-*")  # just started, at work, and something is finished
LONGEST_WAIT_SECONDS = 0.2


def run(plan_dir: Path) -> ShardManifest:
    return run_shard(plan_dir, 0, should_stop=lambda: False, on_progress=None)


def run_and_kill(plan_dir: Path, *, sign: str | None, seconds: float) -> None:
    """Kill a process `seconds` after its start, or after a new file of the name `sign` has appeared."""
    folder = plan_dir.parent / "completions/shard-00000"
    names = set(folder.rglob(sign)) if sign else set()
    process = forked.start(main, [str(plan_dir), "0"])
    while sign and set(folder.rglob(sign)) <= names:
        assert process.is_alive()
        time.sleep(0.002)
    time.sleep(seconds)
    forked.kill(process)


def counted_rows(folder: Path) -> dict[int, list[int]]:
    """Completions by row, after a check that each row has one only."""
    names = counted_files(LocalStore(folder), "part-")
    rows = [row for name in names for row in pq.read_table(folder / name).to_pylist()]
    found = {row["row_index"]: row["completion_token_ids"] for row in rows}
    assert len(found) == len(rows)
    return found


def test_every_row_comes_out_once(llama: Path, tmp_path: Path) -> None:
    requests = stated_requests(make_prompts(NUM_REQUESTS, longest=12), 2)
    for name in ("killed", "whole"):
        write_plan(tmp_path / name / "plan", llama, requests, max_num_seqs=8)
    plan_dir, folder = tmp_path / "killed/plan", tmp_path / "killed/completions/shard-00000"
    drawn = random.Random(7)
    kept: dict[int, list[int]] = {}
    num_gained = 0
    for number in range(NUM_KILLS):
        sign = SIGNS[number % len(SIGNS)]
        run_and_kill(plan_dir, sign=sign, seconds=drawn.uniform(0, LONGEST_WAIT_SECONDS))
        rows = counted_rows(folder)
        assert kept.items() <= rows.items(), "what was finished before stays as it was"
        num_gained += len(rows) > len(kept)
        kept = rows
    assert num_gained >= NUM_KILLS // len(SIGNS) and len(kept) < NUM_REQUESTS, "some got far enough, none was through"
    manifest = run(plan_dir)
    assert (manifest.num_succeeded, manifest.num_resumed) == (NUM_REQUESTS, len(kept))
    run(tmp_path / "whole/plan")
    assert counted_rows(folder) == counted_rows(tmp_path / "whole/completions/shard-00000")
