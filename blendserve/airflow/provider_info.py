"""What Airflow's provider manager reads about this package. Every Airflow process loads it, so it imports little."""

from __future__ import annotations

from typing import Any

from blendserve.airflow.configuration import SECTION, section_info


def get_provider_info() -> dict[str, Any]:
    """The provider's description, in the shape of Airflow's `provider_info.schema.json`."""
    return {
        "package-name": "blendserve",
        "name": "BlendServe",
        "description": "Offline LLM inference as tasks: Parquet in, Parquet out.",
        "integrations": [{"integration-name": "BlendServe", "external-doc-url": "", "tags": ["software"]}],
        "operators": [{"integration-name": "BlendServe", "python-modules": ["blendserve.airflow.operators"]}],
        "config": {SECTION: section_info()},
    }
