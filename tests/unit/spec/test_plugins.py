"""Registries of kinds: builtin entries and those of installed distributions."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tunery.errors import RequestError
from tunery.spec.plugins import Plugin, Registry, installed_plugins

PLATFORM = Path(__file__).parents[3] / "platform"


@dataclass(frozen=True)
class Kind:
    kind: str
    value: int = 0


Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that installs a distribution with one module of the same name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install_distribution(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[tunery.plugins]\n{name} = {name}:PLUGIN\n")
        installed_plugins.cache_clear()

    installed_plugins.cache_clear()
    yield install_distribution
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)
    installed_plugins.cache_clear()


def plugin_with(entry: str) -> str:
    return (
        "from dataclasses import dataclass\n"
        "from tunery.spec.plugins import Plugin\n"
        "import builtins\n"
        f"PLUGIN = Plugin(scorers=({entry},))\n"
    )


def scorers(*builtin: Kind) -> Registry[Kind]:
    return Registry("scorers", Kind, builtin)


@pytest.fixture
def kind_as_builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `Kind` importable by plugin modules, independent of how pytest imports tests."""
    monkeypatch.setattr("builtins.Kind", Kind, raising=False)


def test_registry_without_plugins_has_the_builtin_entries_in_order(install: Install) -> None:
    registry = scorers(Kind("b"), Kind("a", 7))
    assert (list(registry), len(registry), registry["a"].value) == (["b", "a"], 2, 7)


@pytest.mark.usefixtures("kind_as_builtin")
def test_entries_of_an_installed_plugin_follow_the_builtin_ones(install: Install) -> None:
    install("toy_one", plugin_with("builtins.Kind('toy', 3)"))
    registry = scorers(Kind("a"))
    assert (list(registry), registry["toy"].value) == (["a", "toy"], 3)
    assert list(Registry("adapters", Kind, [Kind("a")])) == ["a"], "a plugin without adapters adds none"


@pytest.mark.usefixtures("kind_as_builtin")
@pytest.mark.parametrize("entry", ["builtins.Kind('a')", "builtins.Kind('toy'), builtins.Kind('toy')"])
def test_duplicate_name_is_rejected_with_both_owners(install: Install, entry: str) -> None:
    install("toy_two", plugin_with(entry))
    with pytest.raises(RequestError, match=r"registered twice among the scorers: by (tunery|toy_two) and by toy_two"):
        list(scorers(Kind("a")))


@pytest.mark.parametrize(
    ("code", "message", "cause"),
    [
        ("import no_such_module_at_all", "can't be imported: toy_bad:PLUGIN", "No module named"),
        ("1 / 0", "can't be imported: toy_bad:PLUGIN", "ZeroDivisionError"),
        ("OTHER = 1", "can't be imported: toy_bad:PLUGIN", "AttributeError"),
        ("PLUGIN = {'scorers': []}", "toy_bad:PLUGIN is a dict", "refers to a tunery.spec.plugins.Plugin"),
        (plugin_with("'gopher'"), "its `scorers` hold a str", "hold Kind objects"),
    ],
)
def test_unusable_plugin_is_rejected_with_its_distribution_and_a_remedy(
    install: Install, code: str, message: str, cause: str
) -> None:
    install("toy_bad", code)
    registry = scorers()
    for _ in range(2):  # a failed import must not leave an empty registry
        with pytest.raises(RequestError) as caught:
            len(registry)
        assert message in caught.value.message
        assert cause in caught.value.cause
        assert "pip uninstall toy_bad" in caught.value.remedy
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_plugins_are_not_imported_with_tunery(install: Install, tmp_path: Path) -> None:
    install("toy_late", "raise RuntimeError('too early')")
    code = "import tunery.spec, tunery.cli, tunery.pipeline.validate, tunery.scoring.score"
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{PLATFORM}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr


def test_plugin_without_entries_is_allowed() -> None:
    assert Plugin() == Plugin((), (), ())
