"""What Airflow's provider manager reads about this package. Every Airflow process loads it, so it imports little."""

from __future__ import annotations

from typing import Any

from blendserve.airflow.configuration import SECTION, section_info

CONNECTION_TYPE = "blendserve_object_store"
CONNECTION_NAME = "BlendServe object store"


def get_provider_info() -> dict[str, Any]:
    """The provider's description, in the shape of Airflow's `provider_info.schema.json`."""
    return {
        "package-name": "blendserve",
        "name": "BlendServe",
        "description": "Offline LLM inference as tasks: Parquet in, Parquet out.",
        "integrations": [{"integration-name": "BlendServe", "external-doc-url": "", "tags": ["software"]}],
        "operators": [{"integration-name": "BlendServe", "python-modules": ["blendserve.airflow.operators"]}],
        "connection-types": [_connection_type()],
        "config": {SECTION: section_info()},
    }


def _connection_type() -> dict[str, Any]:
    """The connection's form, as Airflow's provider schema wants it."""

    def field(label: str, description: str, **schema: str) -> dict[str, Any]:
        return {"label": label, "description": description, "schema": {"type": ["string", "null"], **schema}}

    return {
        "connection-type": CONNECTION_TYPE,
        "hook-class-name": "blendserve.airflow.storage.ObjectStoreHook",
        "hook-name": CONNECTION_NAME,
        "ui-field-behaviour": {
            "hidden-fields": ["host", "port", "schema"],
            "relabeling": {"login": "Access key id", "password": "Secret access key"},
        },
        "conn-fields": {
            "endpoint_url": field("Endpoint", "Address of an S3-compatible store; empty: AWS."),
            "aws_session_token": field("Session token", "Of temporary keys only.", format="password"),
            "region_name": field("Region", "Empty: the store's default."),
        },
    }
