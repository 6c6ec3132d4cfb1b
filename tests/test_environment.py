"""What records say about where they were made."""

import subprocess

import pytest

from histodd_bench import environment


def test_commit_outside_a_repository_is_what_the_environment_says(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")  # no git
    monkeypatch.setenv("HISTODD_COMMIT", "0123abc")
    assert environment.commit() == "0123abc"
    monkeypatch.delenv("HISTODD_COMMIT")
    assert environment.commit() is None


def test_commit_inside_the_repository_is_its_own(monkeypatch) -> None:
    monkeypatch.setenv("HISTODD_COMMIT", "0123abc")
    found = environment.commit()
    if found == "0123abc":  # installed, or a copy without .git
        pytest.skip("installed, or a copy without its repository")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert found is not None and found.rstrip("+") == head
