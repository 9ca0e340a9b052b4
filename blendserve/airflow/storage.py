"""Object-store credentials from an Airflow connection, handed to the task and its engine in the environment.

They never go through options, params or URLs, so nothing has to hide them.
"""

from __future__ import annotations

import os

from airflow.sdk import BaseHook

from blendserve.airflow.provider_info import CONNECTION_NAME, CONNECTION_TYPE


class ObjectStoreHook(BaseHook):  # type: ignore[misc]
    """An S3-compatible object store: key id and secret as login and password, and what the extra fields say."""

    conn_name_attr = "storage_conn_id"
    conn_type = CONNECTION_TYPE
    hook_name = CONNECTION_NAME

    def __init__(self, storage_conn_id: str) -> None:
        super().__init__()
        self.storage_conn_id = storage_conn_id

    def get_conn(self) -> dict[str, str]:
        """The variables of the environment that S3 clients read, for this connection. Without a key they stay unset."""
        connection = self.get_connection(self.storage_conn_id)
        extra = connection.extra_dejson
        stated = {
            "AWS_ACCESS_KEY_ID": connection.login or extra.get("aws_access_key_id"),
            "AWS_SECRET_ACCESS_KEY": connection.password or extra.get("aws_secret_access_key"),
            "AWS_SESSION_TOKEN": extra.get("aws_session_token"),
            "AWS_ENDPOINT_URL": extra.get("endpoint_url"),
            "AWS_DEFAULT_REGION": extra.get("region_name"),
        }
        return {name: value for name, value in stated.items() if value}


def use_connection(storage_conn_id: str | None) -> None:
    """Let this process, and those that it starts, reach the object store of the connection."""
    if not storage_conn_id:
        return
    stated = ObjectStoreHook(storage_conn_id).get_conn()
    if "AWS_ACCESS_KEY_ID" in stated:
        os.environ.pop("AWS_SESSION_TOKEN", None)  # which belongs to another key
    os.environ.update(stated)
