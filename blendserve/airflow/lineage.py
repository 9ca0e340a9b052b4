"""What OpenLineage is told of a job: the input it read, the results it wrote, with their columns and counts.

Imported by Airflow's OpenLineage provider only, where it is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from airflow.providers.openlineage.extractors import OperatorLineage


def job_lineage(manifest: dict[str, Any], results: str) -> OperatorLineage:
    """Lineage of the job with this `manifest.json`, whose results lie in the folder or at the URL `results`."""
    from airflow.providers.common.compat.openlineage import facet
    from airflow.providers.openlineage.extractors import OperatorLineage

    import blendserve
    from blendserve.schemas import RESULT_COLUMNS

    counts = manifest["counts"]
    types: dict[str, str | None] = {field.name: str(field.type) for field in RESULT_COLUMNS}
    if manifest["spec"].get("id_column") in (None, "request_id"):
        types["request_id"] = None  # it may be the input's own column, which keeps its type
    columns = [facet.SchemaDatasetFacetFields(name=name, type=kind) for name, kind in types.items()]
    input_dataset = facet.InputDataset(*dataset_name(manifest["spec"]["input"]))
    output_dataset = facet.OutputDataset(
        *dataset_name(results),
        facets={"schema": facet.SchemaDatasetFacet(fields=columns)},
        outputFacets={"outputStatistics": facet.OutputStatisticsOutputDatasetFacet(rowCount=counts["input_rows"])},
    )
    run = _run_facet(
        {
            "version": blendserve.__version__,
            "model": manifest["spec"]["model"],
            "fingerprint": manifest["fingerprint"],
            "counts": counts,
            "tokens": manifest["tokens"],
        }
    )
    return OperatorLineage(inputs=[input_dataset], outputs=[output_dataset], run_facets={"blendserve": run})


def dataset_name(place: str) -> tuple[str, str]:
    """Namespace and name of a path or URL, as OpenLineage's naming rules want them."""
    url = urlsplit(place)
    if url.scheme:
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}", url.path.strip("/")
    return "file", str(Path(place).absolute())


def _run_facet(values: dict[str, Any]) -> Any:
    from airflow.providers.common.compat.openlineage.facet import RunFacet
    from attr import make_class

    return make_class("BlendServeRunFacet", list(values), bases=(RunFacet,), kw_only=True)(**values)
