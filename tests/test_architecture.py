"""Rules of the code base: imports between packages, unused fields, shipped experiments, file list, and terms."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import tunery.spec
from tunery.pipeline.validate import validate
from tunery.spec import ScorerSpec, TunerSpec, load
from tunery.spec.references import Config
from tunery.store import Store

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "tunery"
EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.y*ml"))
SOURCES = sorted(PACKAGE.rglob("*.py"))


# Fields: a field that no code reads has no effect.


def config_classes() -> list[type[Config]]:
    modules = [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages(tunery.spec.__path__, prefix="tunery.spec.")
    ]
    classes = {
        value
        for module in modules
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Config) and value is not Config
    }
    return sorted(classes, key=lambda model: (model.__module__, model.__name__))


def declared_fields() -> list[tuple[str, str]]:
    """Return (class, field) of every field, with the class that declares it."""
    return [
        (model.__name__, field)
        for model in config_classes()
        for field in model.__annotations__
        # The first field of a scorer or tuner is its key and is read as one (ScorerSpec.kind, TunerSpec.kind).
        if field in model.model_fields and not (issubclass(model, ScorerSpec | TunerSpec) and field == model.kind())
    ]


def attributes_read(tree: ast.AST, class_name: str = "") -> set[tuple[str, str]]:
    """Return (attribute, enclosing class) of every `x.name` and getattr(x, "name") that is read.

    `class_name` is the class around `tree`.
    """
    attributes: set[tuple[str, str]] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            attributes.add((node.attr, class_name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            attributes |= {(arg.value, class_name) for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
        attributes |= attributes_read(node, node.name if isinstance(node, ast.ClassDef) else class_name)
    return attributes


@pytest.fixture(scope="module")
def reads() -> set[tuple[str, str]]:
    return set().union(*(attributes_read(ast.parse(path.read_text(encoding="utf-8"))) for path in SOURCES))


@pytest.mark.parametrize(("model", "field"), declared_fields())
def test_every_field_of_an_experiment_is_read_outside_its_own_class(
    model: str, field: str, reads: set[tuple[str, str]]
) -> None:
    # Fields are compared by name only: one that shares its name with another attribute counts as read if that one is.
    assert [reader for name, reader in reads if name == field and reader != model], f"nothing reads {model}.{field}"


# Imports.

SETS_OF_ALTERNATIVES = [PACKAGE / "scoring" / "scorers"]
"""Packages whose modules are alternatives of one kind, which have no order: a new one needs no layer."""


def test_imports_go_down_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from importlinter.cli import lint_imports

    monkeypatch.chdir(ROOT)
    failed = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert not failed, capsys.readouterr().out


def test_every_large_package_has_layers() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = config["tool"]["importlinter"]["contracts"]
    layered = {package for contract in contracts if contract["exhaustive"] for package in contract["containers"]}
    large = {
        "tunery" + "".join(f".{part}" for part in folder.relative_to(PACKAGE).parts)
        for folder in {path.parent for path in SOURCES}
        if len(list(folder.glob("*.py"))) > 12 and folder not in SETS_OF_ALTERNATIVES
    }
    assert large - layered == set()


def test_every_folder_of_the_package_is_a_package() -> None:
    # A folder without __init__.py can be imported in a checkout but is not installed.
    assert [str(path.parent) for path in SOURCES if not (path.parent / "__init__.py").is_file()] == []


def test_source_root_does_not_shadow_pythons_platform() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()


LIGHT_MODULES = [
    "tunery",
    "tunery.spec",
    "tunery.store",
    "tunery.pipeline.validate",
    "tunery.models.row_encodings",
    "tunery.cli",
]
HEAVY_PACKAGES = ["torch", "ray", "transformers", "trl", "deepspeed", "datasets", "wandb"]


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_planning_imports_no_heavy_package(module: str) -> None:
    code = f"import {module}, sys; print(*[name for name in {HEAVY_PACKAGES} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT / "platform")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


# Shipped experiments and the file list.


def test_experiments_are_shipped() -> None:
    assert EXPERIMENTS


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_shipped_experiment_is_valid(path: Path, tmp_path: Path) -> None:
    experiment, source = load(path)
    workers, trial_workers = experiment.compute.workers, experiment.compute.workers_per_trial
    validate(
        experiment,
        source,
        Store(tmp_path),
        2 if workers == "auto" else workers,
        1 if trial_workers == "auto" else trial_workers,
    )


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_shipped_experiment_starts_with_its_question(path: Path) -> None:
    first_line = path.read_text(encoding="utf-8").splitlines()[0]
    assert first_line.startswith("# ")
    assert "?" in first_line


def listed_files(page: str) -> list[str]:
    """Return the paths of the tree in docs/architecture.md, relative to the package.

    Each level is indented by two spaces, and a folder ends in `/`.
    """
    tree = page.split("<!-- files -->")[1].split("<!-- end of files -->")[0]
    folders: list[str] = []
    paths = []
    for indent, name in re.findall(r"^((?:  )+)(\S+?),?(?:\s|$)", tree, flags=re.M):
        del folders[len(indent) // 2 - 1 :]
        if name.endswith("/"):
            folders.append(name)
        else:
            paths.append("".join([*folders, name]))
    return paths


def test_architecture_page_has_a_line_for_every_source_file() -> None:
    listed = listed_files((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    modules = [str(path.relative_to(PACKAGE)) for path in SOURCES if path.name != "__init__.py"]
    assert sorted(set(modules) - set(listed)) == []
    assert [name for name in listed if not list(PACKAGE.glob(name))] == []
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.name != "__main__.py"], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_every_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


# Language.

REPLACED_TERMS = (
    "afresh|anew|bears|breeding|descent|goes on|house|lays|passengers?|seats?|spoilt|told|unfit|wished|wishes|worded"
)
"""Words of earlier versions for which the field has a term (CONTRIBUTING.md). The list grows as they are replaced."""
TEXT_FILES = [*SOURCES, *EXPERIMENTS, *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*.md"))]


@pytest.mark.parametrize("path", TEXT_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_uses_the_terms_of_the_field(path: Path) -> None:
    # `_` and digits separate words, so that identifiers are checked too.
    words = re.compile(rf"(?<![a-z])({REPLACED_TERMS})(?![a-z])", re.IGNORECASE)
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    assert [f"{number}: {line.strip()}" for number, line in lines if words.search(line)] == []


def test_names_of_modules_and_classes_are_unique() -> None:
    modules = Counter(path.stem for path in SOURCES if not path.stem.startswith("__"))
    classes = Counter(
        node.name
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in (modules + classes).items() if count > 1] == []
