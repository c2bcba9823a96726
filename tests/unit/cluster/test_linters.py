"""ShellCheck and hadolint accept the scripts and the Containerfile of cluster/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[3] / "cluster"
SCRIPTS = sorted(CLUSTER.rglob("*.sh"))
BIN = Path(sys.executable).parent


def lint(*words: str | Path) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_accepts_the_script(script: Path) -> None:
    assert lint(BIN / "shellcheck", "--enable=quote-safe-variables", script) == ""


def test_shellcheck_rejects_an_unquoted_variable(tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text("#!/bin/bash\nrm $1\n")
    assert "SC2086" in lint(BIN / "shellcheck", script)


def test_hadolint_accepts_the_containerfile() -> None:
    assert lint(BIN / "hadolint", CLUSTER / "Containerfile") == ""


def test_hadolint_rejects_root(tmp_path: Path) -> None:
    file = tmp_path / "Containerfile"
    file.write_text("FROM docker.io/library/python:3.12\nUSER root\n")
    assert "DL3002" in lint(BIN / "hadolint", file)


def test_image_has_a_user_without_privileges_and_copies_named_files_only() -> None:
    lines = (CLUSTER / "Containerfile").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000:1000"]
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    patterns = (CLUSTER / "Containerfile.dockerignore").read_text(encoding="utf-8").split()
    sent = {pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")}
    assert "*" in patterns
    assert copied == sent
    assert all((CLUSTER.parent / path).exists() for path in copied)
