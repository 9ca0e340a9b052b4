"""What OpenLineage is told of a finished job. Its events in a run: `test_runs_without_server.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from openlineage.client.serde import Serde

from blendserve.airflow.lineage import dataset_name, job_lineage
from blendserve.airflow.operators import MergeOperator

MANIFEST = {
    "counts": {"input_rows": 7, "succeeded": 6, "failed": 1},
    "tokens": {"num_prompt_tokens": 50},
    "fingerprint": "abc",
    "spec": {"input": "s3://me@bucket/in/*.parquet", "model": "smollm2"},
}


def test_job_reports_input_and_results(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("id_column", "kind"), [("review_id", "string"), ("request_id", None), (None, None)])
def test_type_of_the_inputs_own_request_id_is_not_guessed(id_column: str | None, kind: str | None) -> None:
    manifest = {**MANIFEST, "spec": {**MANIFEST["spec"], "id_column": id_column}}
    (written,) = job_lineage(manifest, "/out/results").outputs
    types = {field.name: field.type for field in written.facets["schema"].fields}
    assert (types["request_id"], types["completion"]) == (kind, "string")


def test_job_that_was_not_merged_reports_nothing(tmp_path: Path) -> None:
    assert MergeOperator(task_id="merge", root=str(tmp_path)).get_openlineage_facets_on_complete(None) is None


@pytest.mark.parametrize(
    ("place", "name"),
    [("/data/x", ("file", "/data/x")), ("s3://b/x/y/", ("s3://b", "x/y")), ("s3://k:s@b/x", ("s3://b", "x"))],
)
def test_names_of_datasets_hold_no_credentials(place: str, name: tuple[str, str]) -> None:
    assert dataset_name(place) == name
