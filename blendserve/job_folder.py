"""Where everything of one job lies. The output folder is the job's only state: what is in it is what is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from blendserve.file_store import LocalStore
from blendserve.lease import counted_files


@dataclass(frozen=True, slots=True)
class JobFolder:
    """The output folder of a job.

    job.json  manifest.json  report.html  results/part-*.parquet  _SUCCESS
    work/         what the steps hand to each other, one Parquet file a relation
    sample/       a plan of one shard: the requests that run first to learn output lengths
    plan/         plan.json and shards-<plan>/shard-*.parquet
    completions/  sample/ and shard-*/, each with part-*.parquet, metrics.parquet and shard.json
    leases/       which process has the job in hand; a shard's folder has one of its own
    """

    root: Path

    @property
    def job(self) -> Path:
        return self.root / "job.json"

    @property
    def leases(self) -> Path:
        """Who has the job in hand: see `blendserve.lease`."""
        return self.root / "leases"

    @property
    def work(self) -> Path:
        return self.root / "work"

    def relation(self, name: str) -> Path:
        """The file of the relation `name`, which is also the name of its schema and of its SQL file."""
        return self.work / f"{name}.parquet"

    @property
    def timings(self) -> Path:
        return self.work / "timings.json"

    @property
    def sample(self) -> Path:
        return self.root / "sample"

    @property
    def plan(self) -> Path:
        return self.root / "plan"

    @property
    def completions(self) -> Path:
        return self.root / "completions"

    def completion_files(self) -> list[Path]:
        """The part files of the sample and of all shards that count; see `blendserve.lease` for which do."""
        folders = sorted({path.parent for path in self.completions.glob("**/part-*.parquet")})
        return [folder / name for folder in folders for name in counted_files(LocalStore(folder), "part-")]

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def success(self) -> Path:
        return self.root / "_SUCCESS"
