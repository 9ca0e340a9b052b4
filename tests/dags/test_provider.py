"""What Airflow learns of the package when it is installed: its description, configuration and connection type."""

from __future__ import annotations

import json
import os
from importlib import resources
from importlib.metadata import entry_points

import jsonschema
import pytest

from blendserve.airflow import configuration, storage
from blendserve.airflow.provider_info import CONNECTION_TYPE, get_provider_info
from blendserve.errors import UsageError

CONNECTION = {
    "conn_type": CONNECTION_TYPE,
    "login": "key",
    "password": "hunter2",
    "extra": {"endpoint_url": "http://127.0.0.1:9000", "region_name": None},
}


def test_description_is_what_airflow_wants() -> None:
    schema = json.loads((resources.files("airflow") / "provider_info.schema.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert list(validator.iter_errors(get_provider_info())) == []


def test_number_of_the_configuration_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__BLENDSERVE__RETRY_DELAY_SECONDS", "30s")
    with pytest.raises(UsageError, match=r"\[blendserve\] retry_delay_seconds is '30s', expected a whole number"):
        configuration.get_integer("retry_delay_seconds")


def test_entry_point_leads_to_it() -> None:
    (point,) = [point for point in entry_points(group="apache_airflow_provider") if "blendserve" in point.value]
    assert point.load() is get_provider_info


def test_form_of_the_connection_asks_for_keys_and_endpoint() -> None:
    (form,) = get_provider_info()["connection-types"]
    assert form["connection-type"] == storage.ObjectStoreHook.conn_type
    assert form["hook-class-name"] == f"{storage.__name__}.{storage.ObjectStoreHook.__name__}"
    assert set(form["conn-fields"]) == {"endpoint_url", "aws_session_token", "region_name"}
    assert set(form["ui-field-behaviour"]["relabeling"]) == {"login", "password"}


def test_connection_becomes_the_environment_of_task_and_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_STORE", json.dumps(CONNECTION))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "before")
    storage.use_connection(None)
    assert os.environ["AWS_ACCESS_KEY_ID"] == "before"
    storage.use_connection("store")
    assert os.environ["AWS_ACCESS_KEY_ID"] == "key"
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "hunter2"
    assert os.environ["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9000"
    assert os.environ["AWS_DEFAULT_REGION"] == "before", "what the connection leaves open stays as it is"


@pytest.mark.parametrize("token", [None, "temporary"])
def test_key_of_the_connection_goes_without_the_workers_session_token(
    monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    """A token belongs to one key: with another one the store refuses both."""
    stated = {**CONNECTION, "extra": {"aws_session_token": token}}
    monkeypatch.setenv("AIRFLOW_CONN_STORE", json.dumps(stated))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "the worker's own")
    storage.use_connection("store")
    assert (os.environ["AWS_ACCESS_KEY_ID"], os.environ.get("AWS_SESSION_TOKEN")) == ("key", token)
