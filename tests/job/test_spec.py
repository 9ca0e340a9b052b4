"""What a job may state, from options and from a file, and how mistakes are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from blendserve.errors import UsageError
from blendserve.spec import JobSpec, load_job

REQUIRED = {"input": "i", "output": "o"}


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text('input: i\noutput: o\nmax-tokens: 5\ntop_p: 0.5\nstop: ["\\n", END]\n')
    spec = load_job(file, {"max_tokens": 7})
    assert (spec.max_tokens, spec.top_p, spec.stop) == (7, 0.5, ("\n", "END"))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"inptu": "x"}, "Unknown option 'inptu'. Known options: .*input"),
        ({"max_tokens": 0}, "Option 'max_tokens': .*greater than or equal to 1; got 0"),
        ({"temperature": -1}, "Option 'temperature'"),
        ({"top_p": 0}, "Option 'top_p'"),
        ({"top_k": 2**31}, "Option 'top_k'"),
        ({"policy": "best"}, "Option 'policy': .*'blend', 'dfs'"),
        ({"stop": [""]}, "empty stop string"),
        ({"template": "{{ a }}", "prompt_column": "a"}, "exclude each other"),
    ],
)
def test_mistakes_are_named(stated: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_job(None, {**REQUIRED, **stated})


def test_a_mistake_of_the_whole_job_shows_none_of_its_values() -> None:
    with pytest.raises(UsageError, match="exclude each other") as caught:
        load_job(None, {**REQUIRED, "input": "s3://me:hunter2@bucket", "template": "{{ a }}", "prompt_column": "a"})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("stated", "temperature"), [(0, 0.0), (1e-37, 0.0), (9e-6, 0.0), (1e-5, 1e-5), (0.7, 0.7)])
def test_almost_greedy_is_greedy(stated: float, temperature: float) -> None:
    assert load_job(None, {**REQUIRED, "temperature": stated}).temperature == temperature


@pytest.mark.parametrize(
    ("stated", "output"),
    [
        ("~/out", "/home/me/out"),
        ("file:///data/out", "/data/out"),
        ("s3://bucket/~/out", "s3://bucket/~/out"),
        ("./out/", "./out/"),
    ],
)
def test_where_a_local_output_lies(monkeypatch: pytest.MonkeyPatch, stated: str, output: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load_job(None, {**REQUIRED, "output": stated}).output == output


def test_required_options_are_named() -> None:
    with pytest.raises(UsageError, match=r"Option 'output' is missing. Give --output"):
        load_job(None, {"input": "i"})


@pytest.mark.parametrize("content", ["- a\n- b\n", "input: [", "just text"])
def test_unusable_job_files(tmp_path: Path, content: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(content)
    with pytest.raises(UsageError, match=r"job\.yaml"):
        load_job(file, {})


def test_a_missing_job_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml can't be read"):
        load_job(tmp_path / "nowhere.yaml", {})


def test_every_option_tells_what_it_is() -> None:
    for name, field in JobSpec.model_fields.items():
        assert field.title, name
        assert field.description, name


def test_the_parts_of_a_job_carry_its_values() -> None:
    spec = load_job(None, {**REQUIRED, "max_tokens": 3, "block_size": 8})
    assert (spec.sampling.max_tokens, spec.engine.block_size) == (3, 8)


def test_what_yaml_makes_of_on_and_of_one_stop_string(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("input: i\noutput: o\noverlap: on\nstop: END\n")
    spec = load_job(path, {})
    assert (spec.overlap, spec.stop) == ("on", ("END",))
    path.write_text("input: i\noutput: o\noverlap: off\nstop: ''\n")
    with pytest.raises(UsageError, match="empty stop string"):
        load_job(path, {})
