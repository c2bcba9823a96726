"""The README files, CONTRIBUTING.md and docs/ match the code: links, experiments, commands, generated pages."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from experiment_reference import PATH as REFERENCE
from experiment_reference import page
from pydantic import TypeAdapter
from small_classifiers import write_language_model

from tunery.cli import app
from tunery.pipeline.validate import validate
from tunery.spec import Compute, Search, load
from tunery.spec.feedback import RewardSource
from tunery.spec.stage_kinds import Stage
from tunery.spec.yaml_source import read_yaml
from tunery.store import Store

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), CLUSTER / "README.md"]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.M | re.S)
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_page = pytest.mark.parametrize("path", PAGES, ids=name_of)


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub generates for the headings of a page."""
    counts: dict[str, int] = {}
    result = set()
    for heading in re.findall(r"^#+ (.*)$", prose(path), flags=re.M):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        result.add(slug if slug not in counts else f"{slug}-{counts[slug]}")
        counts[slug] = counts.get(slug, 0) + 1
    return result


@each_page
def test_links_and_anchors_resolve(path: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_index_lists_every_page_and_experiment() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    experiments = {f"../experiments/{path.name}" for path in (ROOT / "experiments").glob("*.yaml")}
    assert [name for name in sorted(pages | experiments) if f"]({name})" not in index] == []


def test_every_benchmark_is_described() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    described = set(re.findall(r"^\| \[`(\w+\.py)`\]", text, flags=re.M))
    assert described == scripts


def test_every_file_for_clusters_is_linked() -> None:
    text = (CLUSTER / "README.md").read_text(encoding="utf-8")
    files = {str(path.relative_to(CLUSTER)) for path in CLUSTER.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name} - {"README.md"}
    assert len(files) > 10
    assert [name for name in sorted(files) if f"]({name})" not in text] == []


def test_readme_has_at_most_200_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_experiment_reference_is_up_to_date() -> None:
    assert REFERENCE.read_text(encoding="utf-8") == page(), "out of date: run `make docs`"


def test_every_key_of_the_reference_has_a_description() -> None:
    assert re.findall(r"^\| `.*\|\s*\|$", page(), flags=re.M) == []


# YAML.


def yaml_blocks() -> list[tuple[str, str, str]]:
    """Return (page and number, info string, text) of each YAML block."""
    return [
        (f"{name_of(path)}-{number}", block["info"].strip(), block["text"])
        for path in PAGES
        for number, block in enumerate(FENCE.finditer(path.read_text(encoding="utf-8")))
        if block["info"].startswith("yaml")
    ]


EXPERIMENTS = [(name, text) for name, info, text in yaml_blocks() if info == "yaml"]
FRAGMENTS = [(name, text) for name, info, text in yaml_blocks() if info == "yaml fragment"]


def test_yaml_blocks_are_experiments_or_marked_as_fragments() -> None:
    assert {info for _, info, _ in yaml_blocks()} == {"yaml", "yaml fragment"}
    assert EXPERIMENTS


@pytest.mark.parametrize("text", [text for _, text in EXPERIMENTS], ids=[name for name, _ in EXPERIMENTS])
def test_experiments_of_the_documentation_validate(text: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"why is row {number} red?", "completion": "it is so"} for number in range(40)]
    for source in re.findall(r"source: ([\w./]+)", text):
        (tmp_path / source).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    if "{pretrained:" in text:
        write_language_model(tmp_path / "model")
    path = tmp_path / "experiment.yaml"
    path.write_text(re.sub(r"\{pretrained: [^}]+\}", "{pretrained: ./model}", text), encoding="utf-8")
    experiment, source = load(path)
    validate(experiment, source, Store(tmp_path / "store"), 2, 1)


@pytest.mark.parametrize("text", [text for _, text in FRAGMENTS], ids=[name for name, _ in FRAGMENTS])
def test_stages_and_search_keys_of_fragments_are_valid(text: str) -> None:
    search: dict[str, Any] = {}
    for name, value in read_yaml(text, "fragment").data.items():
        if isinstance(value, dict) and "kind" in value:
            TypeAdapter(Stage).validate_json(json.dumps(value), strict=True)
        elif name == "compute":
            Compute.model_validate_json(json.dumps(value), strict=True)
        elif name == "reward":  # a key of the stages grpo, rloo and ppo
            TypeAdapter(RewardSource).validate_json(json.dumps(value), strict=True)
        else:
            search[name] = value
    if search:
        complete = {"metric": "sft.eval_loss", "mode": "min", "trials": 1, "space": {"sft.seed": {"choice": [1]}}}
        Search.model_validate_json(json.dumps({**complete, **search}), strict=True)


# Commands.


def commands_of(path: Path) -> Iterator[str]:
    """Yield the `tunery` commands in code blocks and inline code."""
    text = path.read_text(encoding="utf-8")
    lines = [line for block in FENCE.finditer(text) for line in block["text"].splitlines()]
    lines += re.findall(r"^    (\S.*)$", prose(path), flags=re.M)
    lines += re.findall(r"`([^`\n]+)`", prose(path))
    for line in lines:
        if match := re.match(r"(?:\S*/)?tunery ([a-z].*)", line):
            yield match[1]


@each_page
def test_commands_and_options_of_the_documentation_exist(path: Path) -> None:
    unknown = []
    for line in commands_of(path):
        name, *words = shlex.split(line.replace("\\|", "|"), comments=True)
        command = COMMANDS.get(name)
        if subcommands := getattr(command, "commands", None):
            command = subcommands.get(words[0]) if words else None
        if command is None:
            unknown.append(line)
            continue
        options = {option for item in command.params for option in (*item.opts, *item.secondary_opts)}
        unknown += [f"{line}: {word}" for word in words if word.startswith("--") and word not in options]
    assert unknown == []


def test_readme_lists_every_command() -> None:
    listed = re.findall(r"^\| `tunery (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    assert sorted(listed) == sorted(COMMANDS)


def test_names_and_paths_of_the_extending_page_exist() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    package = ROOT / "platform" / "tunery"
    sources = list(package.rglob("*.py"))
    files = [*sources, *(ROOT / "tests").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in files)
    names = set(re.findall(r"`([A-Za-z_]\w{3,})`", page))
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", code)) == []
    modules = {str(path.relative_to(package)) for path in sources}
    paths = set(re.findall(r"(?<![\w/.-])((?:[a-z_]+/)+[a-z_]+\.py)", page))
    missing = [path for path in paths if path not in modules and not (ROOT / path).is_file()]
    assert sorted(path for path in missing if not any(module.endswith(f"/{path}") for module in modules)) == []
