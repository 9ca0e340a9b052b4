"""What OpenLineage is told of a finished job."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from openlineage.client.serde import Serde

from blendserve.airflow.lineage import dataset_name
from blendserve.airflow.operators import MergeOperator

MANIFEST = {
    "counts": {"input_rows": 7, "succeeded": 6, "failed": 1},
    "tokens": {"num_prompt_tokens": 50},
    "fingerprint": "abc",
    "spec": {"input": "s3://me@bucket/in/*.parquet", "model": "smollm2"},
}


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one name that is used of Airflow's OpenLineage provider, which imports and connects much else."""
    module = ModuleType("airflow.providers.openlineage.extractors")
    module.OperatorLineage = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "airflow.providers.openlineage", ModuleType("airflow.providers.openlineage"))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_job_reports_input_and_results(provider: None, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    operator = MergeOperator(task_id="merge", root=str(tmp_path))
    lineage = operator.get_openlineage_facets_on_complete(None)
    (read,), (written,) = lineage.inputs, lineage.outputs
    assert (read.namespace, read.name) == ("s3://bucket", "in/*.parquet")
    assert (written.namespace, written.name) == ("file", f"{tmp_path}/results")
    assert "completion" in [field.name for field in written.facets["schema"].fields]
    assert written.outputFacets["outputStatistics"].rowCount == 7
    facet = Serde.to_dict(lineage.run_facets["blendserve"])
    assert (facet["model"], facet["counts"]["failed"]) == ("smollm2", 1)


def test_job_that_was_not_merged_reports_nothing(provider: None, tmp_path: Path) -> None:
    assert MergeOperator(task_id="merge", root=str(tmp_path)).get_openlineage_facets_on_complete(None) is None


@pytest.mark.parametrize(
    ("place", "name"),
    [("/data/x", ("file", "/data/x")), ("s3://b/x/y/", ("s3://b", "x/y")), ("s3://k:s@b/x", ("s3://b", "x"))],
)
def test_names_of_datasets_hold_no_credentials(place: str, name: tuple[str, str]) -> None:
    assert dataset_name(place) == name
