"""Convert the errors of pydantic to SpecErrors, which name the file, the line, the value, the cause and the remedy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any, Union, get_args, get_origin

from pydantic import Tag
from pydantic_core import ErrorDetails

from tunery.errors import SpecError
from tunery.spec.experiment import Experiment
from tunery.spec.plugins import KindUnion
from tunery.spec.references import Config
from tunery.spec.scorers import SCORERS
from tunery.spec.stage_kinds import STAGE_KINDS
from tunery.spec.tuners import ADAPTERS
from tunery.spec.yaml_source import Path as KeyPath
from tunery.spec.yaml_source import YamlSource


def error_at(source: YamlSource, path: KeyPath, message: str, *, cause: str = "", remedy: str = "") -> SpecError:
    """Return an error with the line of `path`."""
    return SpecError(message, file=source.file, line=source.line(path), cause=cause, remedy=remedy)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a remedy that suggests the known word closest to `word`, or lists all known words if none is close."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(names) or 'none'}"


def translate_all(details: list[ErrorDetails], source: YamlSource) -> list[SpecError]:
    """Return one error per mistake. If a value matches no member of a union, the errors of the members are merged; if a
    required key is misspelled, only the misspelled key is reported, not the missing one."""
    errors: dict[str, SpecError] = {}
    for detail in details:
        if detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]:
            continue  # pydantic counts only the valid items; the invalid ones have errors of their own
        error = _translate(detail, source)
        if error.message in errors:
            errors[error.message].cause += f", or {sentence(detail).removeprefix('it should be ')}"
        else:
            errors[error.message] = error
    misspelled = {error.remedy.split("`")[1] for error in errors.values() if error.remedy.startswith("did you mean")}
    return [
        error
        for error in errors.values()
        if not (error.remedy.startswith("add `") and error.remedy.split("`")[1].split(":")[0] in misspelled)
    ]


def _translate(detail: ErrorDetails, source: YamlSource) -> SpecError:
    path = _path_in_file(detail["loc"], source.data)
    location = ".".join(map(str, path)) or "the experiment"
    kind = detail["type"]
    if kind == "extra_forbidden":
        key = str(detail["loc"][-1])
        owner = ".".join(map(str, path[:-1])) or "an experiment"
        return error_at(source, path, f"`{owner}` has no key `{key}`", remedy=nearest(key, _fields_at(detail["loc"])))
    if kind == "missing":
        key = str(detail["loc"][-1])
        return error_at(source, path, f"`{location}` has no `{key}`, which is required", remedy=f"add `{key}: ...`")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        kinds = list(STAGE_KINDS)
        if kind == "union_tag_not_found":
            return error_at(source, path, f"`{location}` has no `kind`", remedy=f"one of: {', '.join(kinds)}")
        given = str(detail["ctx"]["tag"])
        if detail["ctx"]["discriminator"] == "_scorer_tag()":
            return error_at(
                source,
                path,
                f"`{location}` can't be {_shorten(detail['input'])}",
                cause="a scorer is a mapping whose first key is its kind",
                remedy=nearest(given.removesuffix(" scorer"), SCORERS),
            )
        if detail["ctx"]["discriminator"] == "_tuner_tag()":
            name = given.removesuffix(" without settings")
            return error_at(
                source,
                path,
                f"`{location}` can't be {_shorten(detail['input'])}",
                cause="a tuner is the name of one without settings, or a mapping whose key is its kind",
                remedy=f"write `{{{name}: {{}}}}`" if name in ADAPTERS else nearest(name, ADAPTERS),
            )
        if detail["ctx"]["discriminator"] != "'kind'":
            cause = f"a `{given}` is not allowed here; allowed: {detail['ctx']['expected_tags']}"
            remedy = "use a stage that outputs a model, or {pretrained: <folder or hub name>}"
            return error_at(
                source, path, f"`{location}` can't be {_shorten(detail['input'])}", cause=cause, remedy=remedy
            )
        return error_at(source, (*path, "kind"), f"there is no stage kind `{given}`", remedy=nearest(given, kinds))
    value = _shorten(detail["input"])
    return error_at(source, path, f"`{location}` can't be {value}", cause=sentence(detail))


def sentence(detail: ErrorDetails) -> str:
    """Return the message of a pydantic error as a clause: 'it should be a valid integer'."""
    text = detail["msg"].removeprefix("Value error, ")
    text = text.replace("Input should be", "it should be").replace("Input", "it")
    return text[:1].lower() + text[1:]


def _shorten(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def kind_of(data: Any) -> str:
    return "a list" if isinstance(data, list) else f"one value ({_shorten(data)})"


def _path_in_file(loc: tuple[int | str, ...], data: Any) -> KeyPath:
    """Return the location of a pydantic error without the union tags, which are not in the file."""
    path: list[int | str] = []
    node = data
    for key in loc:
        if isinstance(node, dict):
            exists = key in node
        else:
            exists = isinstance(node, list) and isinstance(key, int) and key < len(node)
        if exists:
            node = node[key]
            path.append(key)
    return tuple(path)


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    """Return the field names of the model that has the last key of `loc`. Follows the annotations along `loc`."""
    annotation: Any = Experiment
    for key in loc[:-1]:
        annotation = _step(annotation, key)
    model = next((member for member in _members(annotation) if _is_model(member)), None)
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _step(annotation: Any, key: int | str) -> Any:
    if _is_model(annotation):
        field = annotation.model_fields.get(key)
        if field is None:
            return annotation
        # pydantic removes the metadata from the annotation; only the members are needed.
        return next((item.union() for item in field.metadata if isinstance(item, KindUnion)), field.annotation)
    origin = get_origin(annotation)
    if origin is dict:
        return get_args(annotation)[1]
    if origin is tuple:
        return get_args(annotation)[0]
    for member in _members(annotation):
        if key in _tags(member):
            return _bare(member)
    for member in _members(annotation):
        if _is_model(_bare(member)) or get_origin(_bare(member)) in (dict, tuple):
            return _step(_bare(member), key)
    return annotation


def _members(annotation: Any) -> list[Any]:
    bare = _bare(annotation)
    return list(get_args(bare)) if get_origin(bare) is Union or type(bare).__name__ == "UnionType" else [bare]


def _bare(annotation: Any) -> Any:
    """Return the type without its metadata: for a `KindUnion` the union."""
    for item in getattr(annotation, "__metadata__", ()):
        if isinstance(item, KindUnion):
            return _bare(item.union())
    return get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def _tags(member: Any) -> set[str]:
    tags = {item.tag for item in getattr(member, "__metadata__", ()) if isinstance(item, Tag)}
    bare = _bare(member)
    if _is_model(bare) and "kind" in bare.model_fields:
        tags.add(get_args(bare.model_fields["kind"].annotation)[0])
    return tags


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Config)
