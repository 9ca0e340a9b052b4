"""How a job takes hold of its output folder: what it keeps, what it refuses, what only force discards."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blendserve import job
from blendserve.errors import InUseError, OutputError
from blendserve.input_files import open_input
from blendserve.job_folder import JobFolder
from blendserve.job_record import JobRecord, claim, holding, read_record, writing_to
from blendserve.manifest import read_json, write_manifest
from blendserve.spec import load_job


@pytest.fixture
def make_record(tmp_path: Path, tiny_model: Path) -> Any:
    def make(text: str = "x", **options: Any) -> JobRecord:
        path = tmp_path / "input.parquet"
        pq.write_table(pa.table({"prompt": [text]}), path)
        spec = load_job(None, {"input": str(path), "output": str(tmp_path / "job"), **options})
        return JobRecord.of(spec, open_input(spec.input), tiny_model)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return JobFolder(tmp_path / "job")


def leave_work(folder: JobFolder) -> Path:
    path = folder.completions / "shard-00000" / "part-00000.parquet"
    path.parent.mkdir(parents=True)
    path.touch()
    folder.plan.mkdir()
    (folder.plan / "plan.json").touch()
    return path


def test_the_same_job_keeps_its_work(folder: JobFolder, make_record: Any) -> None:
    claim(folder, make_record())
    work = leave_work(folder)
    claim(folder, make_record())
    assert work.is_file()
    assert (folder.plan / "plan.json").is_file()


def test_another_order_keeps_completions_and_plans_anew(folder: JobFolder, make_record: Any) -> None:
    claim(folder, make_record())
    work = leave_work(folder)
    claim(folder, make_record(policy="dfs"))
    assert work.is_file()
    assert not (folder.plan / "plan.json").exists()
    assert read_record(folder).spec.policy == "dfs"


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"text": "y"}, "input"),
        ({"max_tokens": 3}, "sampling"),
        ({"temperature": 0.5}, "sampling"),
        ({"system": "S"}, "prompts"),
        ({"limit": 1}, "prompts"),
        ({"dtype": "bfloat16"}, "model"),
    ],
)
def test_another_job_is_refused_and_named(
    folder: JobFolder, make_record: Any, options: dict[str, Any], part: str
) -> None:
    claim(folder, make_record())
    work = leave_work(folder)
    with pytest.raises(OutputError, match=rf"holds another job: {part} changed"):
        claim(folder, make_record(**options))
    assert work.is_file()


def test_force_discards_the_earlier_job(folder: JobFolder, make_record: Any) -> None:
    claim(folder, make_record())
    leave_work(folder)
    folder.success.touch()
    claim(folder, make_record(max_tokens=3, force=True))
    assert not folder.completions.exists()
    assert not folder.success.exists()
    assert read_record(folder).spec.max_tokens == 3


def test_force_discards_once_a_run(folder: JobFolder, make_record: Any) -> None:
    def claim_by(run: str | None, **options: Any) -> None:
        claim(folder, make_record(**options).model_copy(update={"begun_by": run}))

    claim_by(None)
    claim_by("batch/first", force=True)
    work = leave_work(folder)
    claim_by("batch/first", force=True)
    claim_by("batch/another")
    claim_by("batch/first", force=True)
    assert work.is_file(), "a cleared step goes on, also where another run went on meanwhile"
    claim_by("batch/first", force=True, text="other rows")
    assert not work.exists()
    work = leave_work(folder)
    claim_by("batch/second", force=True, text="other rows")
    assert not work.exists()
    work = leave_work(folder)
    claim_by(None, force=True, text="other rows")
    claim_by(None, force=True, text="other rows")
    assert not work.exists(), "the command line has no runs"


def test_force_that_can_not_discard_leaves_the_earlier_job(folder: JobFolder, make_record: Any, tmp_path: Path) -> None:
    """What stays behind would pass as the new job's work."""
    claim(folder, make_record())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.work.symlink_to(elsewhere)  # which can't be removed as a folder, even by root
    with pytest.raises(OutputError, match="can't be written"):
        claim(folder, make_record(max_tokens=3, force=True))
    assert read_record(folder).spec.max_tokens != 3


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_sample_is_planned_anew_unless_it_is_finished(folder: JobFolder, make_record: Any, is_finished: bool) -> None:
    claim(folder, make_record())
    for path in (folder.sample / "plan.json", folder.completions / "sample/shard-00000/shard.json"):
        path.parent.mkdir(parents=True)
        path.touch()
    if not is_finished:
        path.unlink()
    claim(folder, make_record(max_num_seqs=2))
    assert (folder.sample / "plan.json").is_file() == is_finished


def test_a_preview_cut_off_right_after_its_plan_makes_way_for_the_sample(
    folder: JobFolder, make_record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_plan_and_die(folder: JobFolder, *_: object) -> None:
        folder.plan.mkdir(exist_ok=True)
        (folder.plan / "plan.json").touch()
        raise KeyboardInterrupt

    claim(folder, make_record())
    monkeypatch.setattr("blendserve.planner.plan.make_plan", write_plan_and_die)
    monkeypatch.setattr(job, "choose_sample", lambda _root: {"num_requests": 0})
    with pytest.raises(KeyboardInterrupt):
        job.plan(folder.root, is_preview=True)
    assert job.run_sample(folder.root) == {"num_requests": 0}, "not skipped"


def test_what_failed_rows_mean_may_change_after_the_end(folder: JobFolder, make_record: Any) -> None:
    record = make_record(on_row_error="fail")
    claim(folder, record)
    write_manifest(folder.manifest, {"status": "done", "spec": record.spec.model_dump(mode="json")})
    folder.success.touch()
    claim(folder, make_record(on_row_error="continue", policy="dfs"))
    for path in (folder.job, folder.manifest):
        spec = read_json(path)["spec"]
        assert (spec["on_row_error"], spec["policy"]) == ("continue", "blend"), "all else is how the job was run"


@pytest.mark.parametrize("force", [False, True])
def test_a_foreign_folder_is_never_touched(folder: JobFolder, make_record: Any, force: bool) -> None:
    folder.root.mkdir()
    (folder.root / "thesis.doc").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds no job of ours \(thesis\.doc\)"):
        claim(folder, make_record(force=force))
    assert [path.name for path in folder.root.iterdir()] == ["thesis.doc"]


def test_a_folder_that_can_not_be_made(tmp_path: Path, make_record: Any) -> None:
    (tmp_path / "job").write_text("a file where the folder should be")
    with pytest.raises(OutputError, match="can't be written"):
        claim(JobFolder(tmp_path / "job"), make_record())


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"disk of .* is full"), writing_to(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_short_write_to_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=0))
    with pytest.raises(OutputError, match=r"disk of .* is full"), writing_to(tmp_path):
        raise OSError("123 requested and 97 written")


def test_a_folder_without_a_job(folder: JobFolder) -> None:
    with pytest.raises(OutputError, match="holds no job"):
        read_record(folder)


def _try_to_hold(folder: JobFolder, outcome: Any) -> None:
    try:
        with holding(folder.root):
            outcome.put("held")
    except InUseError as error:
        outcome.put(str(error))


def test_two_processes_can_not_hold_one_folder(folder: JobFolder) -> None:
    context = multiprocessing.get_context("spawn")
    outcome = context.Queue()
    with holding(folder.root):
        process = context.Process(target=_try_to_hold, args=(folder, outcome))
        process.start()
        process.join()
    assert f"is in use by process {os.getpid()} on" in outcome.get(timeout=10)
    with holding(folder.root):
        assert [path.name for path in folder.leases.iterdir()] == ["00001.json", "00002.json"]
