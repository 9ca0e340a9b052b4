"""The wheel: built from the checkout, installed into an environment of its own, run from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.end_to_end.command_line import job_options, results

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(CHECKOUT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_three_packages_and_their_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {
        "blendserve",
        "blendserve_kernels",
        "blendserve_sql",
    }
    assert {"blendserve_sql/results.sql", "blendserve/py.typed", "blendserve/report/page.html.j2"} <= set(names)


def test_the_installed_wheel_runs_a_job(wheel: Path, requests: Path, tiny_model: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    # Dependencies come from the test's own environment. A plain path entry doesn't process the .pth files in there, so
    # the editable checkout stays out.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: object) -> str:
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    places = run(python, "-c", "import blendserve, blendserve_kernels, blendserve_sql as s; print(blendserve.__file__)")
    assert str(environment) in places
    run(environment / "bin" / "blendserve", "run", *job_options(requests, tmp_path / "out", tiny_model), "--limit", 6)
    assert len(results(tmp_path / "out")) == 6
