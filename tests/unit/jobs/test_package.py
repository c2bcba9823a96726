"""What is shipped to a cluster: tunery's source and the experiment's code, without data, secrets and environments."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunery.errors import RequestError
from tunery.jobs import package
from tunery.jobs.package import find_files, write_package

SHIPPED = ["experiment.yaml", "rewards.py", "helpers/text.py", "settings.toml"]
NOT_SHIPPED = [
    "rows.jsonl",
    "model/model.safetensors",
    ".env",
    ".venv/lib/site.py",
    "env/pyvenv.cfg",
    "env/lib/site.py",
    "store/runs/small/copy.yaml",
    "__pycache__/rewards.py",
    "my_secret.py",
    "credentials.yaml",
    "wandb/config.yaml",
    ".git/config.toml",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*SHIPPED, *NOT_SHIPPED):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    (tmp_path / "large.py").write_text("#" * (package.MAX_FILE_BYTES + 1))
    (tmp_path / "link.py").symlink_to("/etc/passwd")
    return tmp_path


def own_files(folder: Path) -> list[str]:
    files = find_files(folder / "experiment.yaml", folder / "store")
    return [
        str(file.destination.relative_to("experiment")) for file in files if file.destination.parts[0] == "experiment"
    ]


def test_code_is_shipped_and_nothing_else(folder: Path) -> None:
    assert own_files(folder) == sorted(SHIPPED)


def test_source_of_tunery_is_shipped_completely(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.mktemp("package")
    write_package(find_files(folder / "experiment.yaml", folder / "store"), out)
    source = package.SOURCE
    expected = {path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {path.relative_to(out / "tunery") for path in (out / "tunery").rglob("*") if path.is_file()} == expected
    assert (out / "experiment" / "helpers" / "text.py").read_text() == "# helpers/text.py\n"


def test_experiment_is_shipped_whatever_its_name(folder: Path) -> None:
    (folder / "secret_plan.yml").write_text("name: x\n")
    files = find_files(folder / "secret_plan.yml", folder / "store")
    assert Path("experiment/secret_plan.yml") in [file.destination for file in files]


def test_too_much_code_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MAX_FILES", 3)
    with pytest.raises(RequestError, match="has 4 code files of 0 MB, too many to ship"):
        find_files(folder / "experiment.yaml", folder / "store")
