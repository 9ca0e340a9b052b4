"""An object store as input and output: leases and parts on it, and what a step stages and publishes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from s3fs.errors import translate_boto_error
from typer.testing import CliRunner

from blendserve import cli, job, lease
from blendserve.airflow.operators import MergeOperator
from blendserve.engine.shard_folder import ShardFolder
from blendserve.errors import InputError, InUseError, OutputError, StoreUnreachableError
from blendserve.file_store import FileStore, open_store, reaching
from blendserve.input_files import open_input
from blendserve.job_folder import JobFolder
from blendserve.job_record import holding, read_record
from blendserve.lease import acquire_lease, counted_files
from blendserve.spec import JobSpec
from blendserve.working_copy import _Copy, working_copy
from tests import object_store as stores


@pytest.fixture
def bucket(object_store: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    return stores.use(monkeypatch, object_store)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> FileStore:
    if request.param == "local":
        return open_store(tmp_path / "folder")
    return open_store(f"{request.getfixturevalue('bucket')}/some/folder/")


@pytest.fixture(autouse=True)
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.6)


def names(bucket: str) -> list[str]:
    files = fsspec.filesystem("s3")
    files.invalidate_cache()
    return [name.split("/", 1)[1] for name in sorted(files.find(bucket))]


def test_files_of_a_store(store: FileStore) -> None:
    assert store.read("a/1") is None and store.names("a/") == [] and store.names("a") == []
    assert store.create("a/1", b"first")
    assert not store.create("a/1", b"second")
    store.write("a/2", b"two")
    store.write("ab", b"beside")
    assert store.read("a/1") == b"first"
    assert store.names("a/") == ["a/1", "a/2"]
    assert store.names("a/2") == ["a/2"]
    store.write("a/2", b"again")
    assert store.read("a/2") == b"again"
    store.remove("a/2")
    store.remove("a/2")
    assert store.names("a/") == ["a/1"]


def test_lease_is_taken_over_and_the_late_part_does_not_count(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease.Lease, "_keep_alive", lambda _self: None)
    first = acquire_lease(store, "Shard 0")
    first.take_over([])
    kept = f"part-{first.attempt}-00000.parquet"
    store.write(kept, b"rows")
    claim = json.loads(store.read("leases/00001.json") or b"")
    store.write("leases/00001.json", json.dumps(claim | {"machine": "another x y"}).encode())
    second = acquire_lease(store, "Shard 0")
    second.take_over(second.inherited("part-"))
    store.write(f"part-{first.attempt}-00001.parquet", b"late rows")
    assert counted_files(store, "part-") == [kept]
    with pytest.raises(InUseError):
        first.close([])
    second.close([kept])
    assert counted_files(store, "part-") == [kept]


@pytest.fixture
def spec(bucket: str, tiny_model: Path) -> Iterator[JobSpec]:
    table = pa.table({"id": [f"row-{n}" for n in range(12)], "prompt": [f"number {n}" for n in range(12)]})
    with fsspec.open(f"{bucket}/in/day=1/rows.parquet", "wb") as file:
        pq.write_table(table, file)
    yield JobSpec(
        input=f"{bucket}/in", output=f"{bucket}/out", model=str(tiny_model), id_column="id", max_tokens=4, shards=2
    )


def options(spec: JobSpec) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in spec.model_dump(exclude_unset=True).items()]


def call(*arguments: str) -> dict[str, Any]:
    """The command's last line."""
    done = CliRunner().invoke(cli.app, [*arguments, "--json"])
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_whole_job_from_object_store_to_object_store(spec: JobSpec, bucket: str) -> None:
    assert call("plan", *options(spec))["plan_dir"] == f"{spec.output}/plan"
    manifest = job.run(spec)
    assert manifest["counts"]["succeeded"] == 12
    for command in ("merge", "report", "show"):
        assert call(command, spec.output)["exit_status"] == 0
    results = pq.read_table(f"{bucket.removeprefix('s3://')}/out/results", filesystem=fsspec.filesystem("s3"))
    assert results["id"].to_pylist() == [f"row-{n}" for n in range(12)]
    assert results["day"].to_pylist() == [1] * 12
    assert {"out/_SUCCESS", "out/job.json", "out/report.html", "out/manifest.json"} <= set(names(bucket))
    assert job.run(spec)["already_done"]


@pytest.mark.parametrize(
    "use",
    [
        lambda spec: call("plan", *options(spec)),
        lambda spec: call("merge", spec.output),
        lambda spec: MergeOperator(task_id="merge", root=spec.output).execute({}),
    ],
    ids=["plan", "merge", "merge task"],
)
def test_a_url_is_held_until_its_files_are_back(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch, use: Callable[[JobSpec], Any]
) -> None:
    job.preview(spec)
    held_at: list[str] = []

    def checked(name: str) -> None:
        step = getattr(_Copy, name)

        def while_held(copy: _Copy, *arguments: Any) -> None:
            with pytest.raises(InUseError):
                acquire_lease(open_store(spec.output), "The job")
            held_at.append(name)
            step(copy, *arguments)

        monkeypatch.setattr(_Copy, name, while_held)

    checked("stage")
    checked("publish")
    use(spec)
    assert held_at == ["stage", "publish"]
    with acquire_lease(open_store(spec.output), "The job"):
        pass


def test_steps_go_on_from_what_the_object_store_holds(spec: JobSpec, bucket: str) -> None:
    """Each step in a local copy of its own, as on machines that share nothing else."""
    with working_copy(spec.output, []) as root:
        job.extract(spec, root)
    steps: list[tuple[Any, list[str]]] = [
        (job.tokenize, ["work/requests.parquet"]),
        (job.analyze, ["work/tokenized_requests.parquet"]),
        (job.run_sample, ["work/*", "sample/*"]),
        (job.plan, ["work/*", "completions/*"]),
    ]
    for step, reads in steps:
        with working_copy(spec.output, reads) as root:
            step(root)
    for shard in (0, 1):
        with working_copy(spec.output, [f"plan/*shard-{shard:05d}.parquet"]) as root:
            job.run_shard(root / "plan", shard, completions=f"{spec.output}/completions")
    assert {f"out/completions/shard-0000{shard}/shard.json" for shard in (0, 1)} <= set(names(bucket))
    with holding(spec.output) as held, working_copy(spec.output, ["work/*", "completions/*"]) as root:
        assert job.merge(root, held)["succeeded"] == 12
    with working_copy(spec.output, []) as root:
        job.finish(root)
    assert "out/_SUCCESS" in names(bucket)


def test_shard_killed_in_mid_run_goes_on_from_the_object_store(spec: JobSpec, bucket: str) -> None:
    """kill -9: the parts that were sent by then count, and no finished row runs again."""
    num_rows = 36
    table = pa.table({"id": [f"row-{n}" for n in range(num_rows)], "prompt": [f"number {n}" for n in range(num_rows)]})
    with fsspec.open(f"{bucket}/long/rows.parquet", "wb") as file:
        pq.write_table(table, file)
    changes = {"input": f"{bucket}/long", "max_tokens": 200, "ignore_eos": True, "max_num_seqs": 1, "shards": 1}
    place = f"{spec.output}/completions"
    store = open_store(f"{place}/shard-00000")
    with working_copy(spec.output) as root:
        job.extract(spec.model_copy(update=changes), root)
        for step in (job.tokenize, job.analyze, job.plan):
            step(root)
        kill_in_mid_shard(root / "plan", place, lambda: bool(store.names("part-")))
        kept = [row for name in counted_files(store, "part-") for row in rows_of(store, name)]
        shard = job.run_shard(root / "plan", 0, completions=place)
    assert 0 < shard.num_resumed == len(kept) < num_rows
    assert sorted(row for name in store.names("part-") for row in rows_of(store, name)) == list(range(num_rows))
    with holding(spec.output) as held, working_copy(spec.output, ["work/*", "completions/*"]) as root:
        assert job.merge(root, held)["succeeded"] == num_rows


def kill_in_mid_shard(plan: Path, completions: str, has_progressed: Callable[[], bool]) -> None:
    command = [sys.executable, "-m", "blendserve.engine.run_shard", "--completions", completions, str(plan), "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as engine:
        while not has_progressed():
            assert engine.poll() is None, "the shard is too short for this test"
            time.sleep(0.1)
        engine.kill()


def rows_of(store: FileStore, name: str) -> list[int]:
    rows: list[int] = pq.read_table(pa.BufferReader(store.read(name)))["row_index"].to_pylist()
    return rows


def test_other_files_are_there_by_name_only(bucket: str) -> None:
    store = open_store(f"{bucket}/job")
    for name in ("job.json", "work/a.parquet", "work/b.parquet", "plan/plan.json"):
        store.write(name, name.encode())
    with working_copy(f"{bucket}/job", ["work/a.parquet"]) as root:
        assert (root / "work/a.parquet").read_bytes() == b"work/a.parquet"
        assert (root / "plan/plan.json").read_bytes() == b"plan/plan.json"
        assert (root / "work/b.parquet").read_bytes() == b""
        (root / "plan/plan.json").unlink()
        (root / "work/a.parquet").write_bytes(b"changed")
        (root / "work/.c.parquet.1.tmp").write_bytes(b"half")
    assert names(bucket) == ["job/job.json", "job/work/a.parquet", "job/work/b.parquet"]
    assert store.read("work/a.parquet") == b"changed"
    assert store.read("work/b.parquet") == b"work/b.parquet", "what wasn't fetched isn't sent back"


def test_manifests_are_published_after_what_they_speak_of(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = fsspec.filesystem("s3")
    sent: list[str] = []
    put_file = files.put_file
    monkeypatch.setattr(files, "put_file", lambda local, remote: (sent.append(remote), put_file(local, remote)))
    with working_copy(f"{bucket}/job") as root:
        for name in ("_SUCCESS", "job.json", "manifest.json", "plan/plan.json", "plan/shards-1/x.parquet", "results/y"):
            (root / name).parent.mkdir(exist_ok=True, parents=True)
            (root / name).write_text(name)
    order = [name.split("/", 2)[2] for name in sent]
    assert order[0] == "job.json" and order[-3:] == ["plan/plan.json", "manifest.json", "_SUCCESS"]


def test_what_was_done_before_an_error_is_published(bucket: str) -> None:
    with pytest.raises(ZeroDivisionError), working_copy(f"{bucket}/job") as root:
        (root / "kept").write_text("kept")
        raise ZeroDivisionError
    assert names(bucket) == ["job/kept"]


def test_errors_name_the_url(bucket: str) -> None:
    with pytest.raises(OutputError, match=f"^{bucket}/job holds no job"), working_copy(f"{bucket}/job") as root:
        read_record(JobFolder(root))


def test_unreachable_store_is_an_output_error(bucket: str) -> None:
    message = "s3://no-such-bucket/job can't be read or written"
    with pytest.raises(OutputError, match=message), working_copy("s3://no-such-bucket/job") as root:
        (root / "x").write_text("x")


@pytest.fixture
def silent_store(bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A URL of a store where nobody listens."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    fsspec.filesystem("s3").clear_instance_cache()
    return "s3://bucket/job"


def test_a_silent_store_may_answer_later(silent_store: str) -> None:
    message = f"{silent_store} doesn't answer: .*Try again later"
    with pytest.raises(StoreUnreachableError, match=message), working_copy(silent_store):
        pass
    with pytest.raises(StoreUnreachableError, match=message):
        open_input(silent_store)
    with pytest.raises(StoreUnreachableError, match=message), ShardFolder(silent_store).locked():
        pass


@pytest.mark.parametrize(
    ("code", "status", "is_retried"),
    [
        ("SlowDown", 503, True),
        ("InternalError", 500, True),
        ("TooManyRequests", 429, True),
        ("RequestTimeout", 400, True),
        ("NoSuchBucket", 404, False),
        ("AccessDenied", 403, False),
        ("PreconditionFailed", 412, False),
    ],
)
def test_an_answer_that_says_come_back_later(code: str, status: int, is_retried: bool) -> None:
    response = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    kind = StoreUnreachableError if is_retried else OutputError
    with pytest.raises(kind), reaching("s3://bucket/job"):
        raise translate_boto_error(ClientError(response, "PutObject"))


def test_a_holder_outlives_a_store_that_is_gone_for_a_while(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "LEASE_SECONDS", 30.0)
    monkeypatch.setattr(lease, "_BEATS_A_LEASE", 3000)
    store = open_store(f"{bucket}/folder")
    num_errors = 0

    def fail(_name: str) -> bytes:
        nonlocal num_errors
        num_errors += 1
        raise EndpointConnectionError(endpoint_url=bucket)

    with acquire_lease(store, "Shard 0") as held:
        with monkeypatch.context() as gone:
            gone.setattr(fsspec.filesystem("s3"), "cat_file", fail)
            while num_errors < 2 and held._thread.is_alive():
                time.sleep(0.01)
        assert held._thread.is_alive(), "the heartbeat goes on"
        held.check()


def test_missing_credentials_are_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(InputError, match="can't be reached: Unable to locate credentials"):
        open_input(f"{bucket}/in/x.parquet")


def test_local_folder_is_its_own_copy(tmp_path: Path) -> None:
    with working_copy(str(tmp_path), []) as root:
        assert root == tmp_path
