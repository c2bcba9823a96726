"""The dataset `builtin:python-docs`: the documentation that is part of every Python installation.

It provides data for experiments without a download: the docstrings of the standard library and the language reference
in `pydoc_data.topics`, 1.8 MB of technical prose under Python's license.

The docstrings are read in a child interpreter, because importing the complete standard library leaves hundreds of
modules, handlers and warning filters behind. The child runs this file as a script, so the file does not import the rest
of the package at module level; it prints one JSON record per line.

The dataset depends only on the interpreter (see `identity`), not on hash order, memory addresses or paths.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import logging
import os
import pkgutil
import re
import subprocess
import sys
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal, TextIO

logger = logging.getLogger(__name__)

Subset = Literal["texts", "questions", "preferences", "corrupted", "prompts"]
Row = dict[str, Any]

CORPUS_VERSION = 1
"""Increase this when a change of this file changes any row: `identity` is part of cache keys."""

MAX_RESPONSE_CHARS = 600
"""Maximum length of a response: about 150 tokens, which a small model can learn to reproduce completely."""

MIN_RESPONSE_CHARS = 20
"""Minimum length of a response. Shorter docstrings ("abs(self)") add nothing to the name."""

MAX_PASSAGE_CHARS = 2000
"""Maximum length of a passage of text: about 500 tokens, so that a short context truncates little."""

MIN_QUOTATION_CHARS = 60
"""Minimum length of a paragraph that counts as a quotation if two topics contain it, unlike "For example:"."""

CHILD_TIMEOUT_S = 120
"""Timeout of the child interpreter. Reading takes one to three seconds, but much longer on an overloaded machine."""

SKIPPED_MODULES = frozenset(
    {
        "__main__",
        "antigravity",  # opens a browser
        "distutils",  # replaced by setuptools if installed, removed in Python 3.12
        "encodings",  # 120 generated code pages
        "ensurepip",
        "idlelib",
        "lib2to3",  # writes grammar caches, removed in Python 3.13
        "ntpath",  # platform-specific os.path; the next modules are platform-specific too
        "nt",
        "posix",
        "posixpath",
        "pydoc_data",  # read as topics
        "test",
        "tests",
        "this",  # prints a poem
        "tkinter",  # needs a display, like turtle
        "turtle",
        "turtledemo",
        "xxlimited",  # examples of how to write a C module
        "xxlimited_35",
        "xxsubtype",
    }
)
"""Names of modules and submodules that are not imported."""

QUESTION_TEMPLATES: dict[str, tuple[str, ...]] = {
    "module": (
        "What is the module `{}` for?",
        "What does the Python module `{}` offer?",
        "Describe the standard library module `{}`.",
    ),
    "class": ("What is `{}`?", "What is the class `{}` for?", "Describe the Python class `{}`."),
    "function": ("What does `{}` do?", "What is the function `{}` for?", "Explain the Python function `{}`."),
    "method": ("What does `{}` do?", "What is the method `{}` for?", "Explain the Python method `{}`."),
    "property": ("What is `{}`?", "What does the attribute `{}` hold?", "Explain the Python attribute `{}`."),
}

_PROPERTY_TYPES = (
    property,
    cached_property,
    types.DynamicClassAttribute,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)


@dataclass(frozen=True)
class DocumentedObject:
    """An object of the standard library with its own (not an inherited) docstring, or a topic of the language
    reference.

    `name` is the qualified name ("os.path.join", "print"; "topic:if" for a topic); `kind` is one of module, class,
    function, method, property and topic; `signature` is like "(a, *p)", without annotations, and "" if unknown; `doc`
    is the docstring after `inspect.cleandoc`.
    """

    name: str
    kind: str
    signature: str
    doc: str


# ----------------------------------------------------------------------------------------------------
# Public functions
# ----------------------------------------------------------------------------------------------------


def identity() -> str:
    """Return what the dataset depends on: equal identities mean equal rows. Does not read the documentation.

    Builds of the same version can differ in optional modules (`dbm.gnu`, `curses`); see `unimportable_modules`.
    """
    version = ".".join(str(part) for part in sys.version_info)
    return f"python-docs-{CORPUS_VERSION}:{sys.implementation.name}-{version}-{sys.platform}"


@cache
def documented_objects() -> tuple[DocumentedObject, ...]:
    """Return all documented objects of this Python, sorted by name, without duplicate docstrings.

    Raises RuntimeError with the stderr of the child interpreter if it fails.
    """
    return _read()[0]


def unimportable_modules() -> dict[str, str]:
    """Return the modules of the standard library that can't be imported (such as those of other platforms), with the
    reason by name."""
    return dict(_read()[1])


def rows(subset: Subset, is_included: Callable[[str], bool] = lambda group: True) -> Iterator[Row]:
    """Return the rows of a subset whose group satisfies `is_included`. They are sorted by a hash of their names, so
    that the first n rows are a sample.

    Every row has a `group`, the object's name; rows of the same group belong in the same split. Its other columns are

    - texts: `text`, a passage with a heading
    - questions: `messages`, a user's question about an object and the assistant's response
    - preferences: `messages` as in questions, and `rejected`, the response for another included object of the same
      kind (so that a split never contains responses of another split)
    - corrupted: `messages` as in questions, and `rejected`, the same response with injected corruption
      (ingest/corruption.py). Which response is better is visible in the response alone, which a small model can learn
    - prompts: `messages`, only the question

    No correct response occurs twice. Raises ValueError for an unknown subset.
    """
    builders: dict[str, Callable[[], Iterator[Row]]] = {
        "texts": _texts,
        "questions": _questions,
        "preferences": lambda: _preferences(is_included),
        "corrupted": lambda: _corrupted(is_included),
        "prompts": _prompts,
    }
    if subset not in builders:
        raise ValueError(f"builtin:python-docs has no subset {subset!r}: choose one of {', '.join(builders)}.")
    return (row for row in builders[subset]() if is_included(row["group"]))


# ----------------------------------------------------------------------------------------------------
# Rows
# ----------------------------------------------------------------------------------------------------


def _texts() -> Iterator[Row]:
    objects = documented_objects()
    topics = _topics_without_quotations(o for o in objects if o.kind == "topic")
    for thing in _by_hash([o for o in objects if o.kind != "topic"] + topics):
        if thing.kind == "topic":
            heading, _, body = thing.doc.partition("\n")
            body = body.lstrip("*=-\n")
        else:
            heading, body = thing.name + thing.signature, thing.doc
        for number, passage in enumerate(_passages(body)):
            title = heading if number == 0 else f"{heading.removesuffix(thing.signature)} (continued)"
            yield {"text": f"{title}\n\n{passage}", "group": thing.name}


def _questions() -> Iterator[Row]:
    for thing, response in _responses():
        yield {"messages": [_question(thing), _message("assistant", response)], "group": thing.name}


def _prompts() -> Iterator[Row]:
    for thing, _ in _responses():
        yield {"messages": [_question(thing)], "group": thing.name}


def _preferences(is_included: Callable[[str], bool]) -> Iterator[Row]:
    """Yield preference pairs. Each response is rejected once, for the next included object of its kind."""
    responses = [(thing, response) for thing, response in _responses() if is_included(thing.name)]
    by_kind: dict[str, list[str]] = defaultdict(list)
    for thing, response in responses:
        by_kind[thing.kind].append(response)
    num_used: Counter[str] = Counter()
    for thing, response in responses:
        others = by_kind[thing.kind]
        rejected = others[num_used[thing.kind] - 1]
        num_used[thing.kind] += 1
        if len(others) > 1:
            yield {
                "messages": [_question(thing), _message("assistant", response)],
                "rejected": [_message("assistant", rejected)],
                "group": thing.name,
            }


def _corrupted(is_included: Callable[[str], bool]) -> Iterator[Row]:
    from tunery.ingest.corruption import corrupt  # not at module level: this file is also run as a script

    rows = [row for row in _questions() if is_included(row["group"])]
    for row, other in zip(rows, corrupt(rows, 1.0, seed=CORPUS_VERSION), strict=True):
        if row["messages"] != other["messages"]:
            yield {**row, "rejected": [other["messages"][-1]]}


@cache
def _responses() -> tuple[tuple[DocumentedObject, str], ...]:
    """Return the objects with their responses, in the order of the rows.

    Docstrings may differ only after the part that is the response. Only the object with the shortest name keeps such a
    response: in different splits, duplicates would leak training data into the test data.
    """
    owner: dict[str, tuple[DocumentedObject, str]] = {}
    for thing in sorted(documented_objects(), key=_name_order):
        response = _response(thing.doc)
        if thing.kind != "topic" and len(response) >= MIN_RESPONSE_CHARS:
            owner.setdefault(_normalised(response), (thing, response))
    response_of = dict(owner.values())
    return tuple((thing, response_of[thing]) for thing in _by_hash(response_of))


def _response(doc: str) -> str:
    """Return the leading paragraphs that fit into a response, or the leading sentences if the first paragraph is too
    long; "" if no sentence fits."""
    paragraphs = _leading(_paragraphs(doc), "\n\n")
    if not paragraphs:
        return " ".join(_leading(re.split(r"(?<=[.!?])\s+", _paragraphs(doc)[0]), " "))
    # A last paragraph like "Usage:" introduces an omitted one.
    while len(paragraphs) > 1 and paragraphs[-1].endswith(":"):
        paragraphs.pop()
    return "\n\n".join(paragraphs)


def _leading(parts: list[str], separator: str) -> list[str]:
    """Return the leading parts that fit into MAX_RESPONSE_CHARS."""
    length = 0
    for count, part in enumerate(parts):
        length += len(part) + (len(separator) if count else 0)
        if length > MAX_RESPONSE_CHARS:
            return parts[:count]
    return list(parts)


def _question(thing: DocumentedObject) -> dict[str, str]:
    templates = QUESTION_TEMPLATES[thing.kind]
    # Use another byte than those that determine the order, or the first rows would all use the same template.
    index = hashlib.sha256(thing.name.encode()).digest()[-1] % len(templates)
    return _message("user", templates[index].format(thing.name))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _topics_without_quotations(topics: Iterable[DocumentedObject]) -> list[DocumentedObject]:
    """Return the topics without paragraphs that a shorter topic contains.

    Chapters of the reference include complete sections ("compound" includes "if", "for", "while", ...). A sixth of the
    text is duplicated, so the same page could be in two splits.
    """
    seen: set[str] = set()
    result = []
    for topic in sorted(topics, key=lambda t: (len(t.doc), t.name)):
        title, *paragraphs = _paragraphs(topic.doc)
        long = [paragraph for paragraph in paragraphs if len(paragraph) >= MIN_QUOTATION_CHARS]
        own: list[str] = []
        # A short paragraph, such as a heading or "Note:", is kept if the next long paragraph is, or else the last one.
        kept = not long or _normalised(long[-1]) not in seen
        for paragraph in reversed(paragraphs):
            if len(paragraph) >= MIN_QUOTATION_CHARS:
                kept = _normalised(paragraph) not in seen
            if kept:
                own.insert(0, paragraph)
        seen.update(_normalised(paragraph) for paragraph in paragraphs)
        if own:
            result.append(replace(topic, doc="\n\n".join([title, *own])))
    return result


def _passages(doc: str) -> Iterator[str]:
    """Split a text into passages of at most MAX_PASSAGE_CHARS.

    Texts are split between paragraphs, and longer paragraphs between lines. A line that is longer is not split.
    """
    passage = ""
    for paragraph in _paragraphs(doc):
        long = len(paragraph) > MAX_PASSAGE_CHARS
        for number, piece in enumerate(paragraph.split("\n") if long else [paragraph]):
            separator = "\n" if number else "\n\n"
            joined = passage + separator + piece if passage else piece
            if passage and len(joined) > MAX_PASSAGE_CHARS:
                yield passage
                joined = piece
            passage = joined
    if passage:
        yield passage


def _paragraphs(doc: str) -> list[str]:
    return [p for p in re.split(r"\n(?:[ \t]*\n)+", doc) if p.strip()]


def _normalised(doc: str) -> str:
    """Normalize white space and case, to compare texts."""
    return " ".join(doc.split()).casefold()


def _name_order(thing: DocumentedObject) -> tuple[int, str]:
    return len(thing.name), thing.name


def _by_hash(things: Iterable[DocumentedObject]) -> list[DocumentedObject]:
    return sorted(things, key=lambda thing: hashlib.sha256(thing.name.encode()).digest())


# ----------------------------------------------------------------------------------------------------
# Reading the child interpreter
# ----------------------------------------------------------------------------------------------------


@cache
def _read() -> tuple[tuple[DocumentedObject, ...], dict[str, str]]:
    """Return the objects and the unimportable modules, which this file prints when it is run as a script.

    -I and -S exclude the user's paths and site-packages, where a .pth file can replace a standard module; -B prevents
    the child from writing to the installation.
    """
    command = [sys.executable, "-I", "-S", "-B", "-W", "ignore", "-X", "utf8", os.path.abspath(__file__)]
    child = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=CHILD_TIMEOUT_S,
        check=False,
    )
    if child.returncode != 0:
        raise RuntimeError(
            f"Reading the documentation failed: {' '.join(command)} ended with status {child.returncode}. "
            f"Run it by hand to see why. The end of its stderr: {child.stderr[-2000:].strip() or '(none)'}"
        )
    objects, missing = [], {}
    for line in child.stdout.splitlines():
        record = json.loads(line)
        if "unimportable" in record:
            missing[record["unimportable"]] = record["reason"]
        else:
            objects.append(DocumentedObject(**record))
    logger.info(
        "%d documented objects; %d modules not importable here: %s",
        len(objects),
        len(missing),
        ", ".join(missing),
    )
    return tuple(objects), missing


# ----------------------------------------------------------------------------------------------------
# In the child interpreter
# ----------------------------------------------------------------------------------------------------


def _print_documentation(out: TextIO) -> None:
    modules, missing = _import_standard_library()
    objects = [*_documented(modules), *_topics()]
    unique: dict[str, DocumentedObject] = {}
    for thing in sorted(objects, key=_name_order):
        unique.setdefault(_normalised(thing.doc), thing)
    for name in sorted(missing):
        print(json.dumps({"unimportable": name, "reason": missing[name]}), file=out)
    for thing in sorted(unique.values(), key=lambda t: t.name):
        print(json.dumps(asdict(thing)), file=out)


def _import_standard_library() -> tuple[dict[str, types.ModuleType], dict[str, str]]:
    """Return public modules and submodules by name, and the reasons by name of those that can't be imported."""
    modules: dict[str, types.ModuleType] = {}
    missing: dict[str, str] = {}
    pending = [*sorted(sys.stdlib_module_names | set(sys.builtin_module_names), reverse=True), "os.path"]
    while pending:
        name = pending.pop()
        last = name.rpartition(".")[2]
        if last.startswith("_") or last in SKIPPED_MODULES or name in modules:
            continue
        try:
            module = importlib.import_module(name)
        # Modules of other platforms fail in many ways, including SystemExit.
        except (Exception, SystemExit) as error:
            missing[name] = f"{type(error).__name__}: {error}"
            continue
        modules[name] = module
        children = pkgutil.iter_modules(getattr(module, "__path__", ()))
        pending += sorted((f"{name}.{child.name}" for child in children), reverse=True)
    return modules, missing


def _documented(modules: dict[str, types.ModuleType]) -> Iterator[DocumentedObject]:
    for name, module in modules.items():
        yield from _documented_object(name, "module", module, module.__doc__)
    for name, thing in _public_objects(modules):
        if isinstance(thing, type):
            yield from _documented_class(name, thing)
        else:
            yield from _documented_object(name, "function", thing, thing.__doc__)


def _public_objects(modules: dict[str, types.ModuleType]) -> Iterator[tuple[str, Any]]:
    """Yield classes and functions of the modules, each once, with its best name."""
    names: dict[int, set[str]] = defaultdict(set)
    things: dict[int, Any] = {}
    for module_name, module in modules.items():
        for attribute, thing in _own_attributes(module_name, module):
            things[id(thing)] = thing
            names[id(thing)].add(f"{module_name}.{attribute}")
    for key, thing in things.items():
        yield _best_name(thing, names[key], modules).removeprefix("builtins."), thing


def _own_attributes(module_name: str, module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield public classes and functions of a module, without those that it only imports.

    These are the objects listed in `__all__` or defined in the module; without `__all__` also objects from private
    modules, such as the C implementation of `datetime`.
    """
    exported = getattr(module, "__all__", None)
    for attribute, thing in sorted(vars(module).items()):
        if attribute.startswith("_") or not (isinstance(thing, type) or inspect.isroutine(thing)):
            continue
        module_of_thing = getattr(thing, "__module__", None) or module_name
        defined_here = module_of_thing == module_name or (exported is None and module_of_thing.startswith("_"))
        if defined_here or (exported is not None and attribute in exported):
            yield attribute, thing


def _best_name(thing: Any, names: set[str], modules: dict[str, types.ModuleType]) -> str:
    """Return the name from `__module__` and `__qualname__` if it is public and refers to the object, otherwise its
    shortest name.

    A package that exports an object of its submodule is preferred: `asyncio.run`, not `asyncio.runners.run`.
    """
    module_name = getattr(thing, "__module__", None) or ""
    qualname = getattr(thing, "__qualname__", None) or "_"
    if not qualname.startswith("_") and getattr(modules.get(module_name), qualname, None) is thing:
        packages = {f"{package}.{qualname}" for package in _packages(module_name)}
        names = (names & packages) | {f"{module_name}.{qualname}"}
    return min(names, key=lambda name: (len(name), name))


def _packages(module_name: str) -> list[str]:
    parts = module_name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _documented_class(name: str, cls: type) -> Iterator[DocumentedObject]:
    members = vars(cls)
    yield from _documented_object(name, "class", cls, members.get("__doc__"))
    for attribute, member in members.items():
        if attribute.startswith("_") and not (attribute.startswith("__") and attribute.endswith("__")):
            continue
        member_name = f"{name}.{attribute}"
        if isinstance(member, _PROPERTY_TYPES):
            yield from _documented_object(member_name, "property", None, member.__doc__)
        elif isinstance(member, type):
            if member.__qualname__ == f"{cls.__qualname__}.{attribute}" and member.__module__ == cls.__module__:
                yield from _documented_class(member_name, member)
        elif isinstance(member, (staticmethod, classmethod)):
            yield from _documented_object(member_name, "method", member.__func__, member.__func__.__doc__)
        elif inspect.isroutine(member):
            yield from _documented_object(member_name, "method", member, member.__doc__)


def _topics() -> Iterator[DocumentedObject]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name, text in topics.items():
        yield from _documented_object(f"topic:{name}", "topic", None, text)


def _documented_object(name: str, kind: str, thing: object, doc: object) -> Iterator[DocumentedObject]:
    """Yield the object, or nothing if its docstring is missing, empty or not a string (a class may compute it)."""
    text = _without_addresses(inspect.cleandoc(doc)).strip() if isinstance(doc, str) else ""
    if text:
        yield DocumentedObject(name, kind, _signature(thing), text)


def _signature(thing: object) -> str:
    if not callable(thing):
        return ""
    try:
        signature = inspect.signature(thing)
    # Not every C function has a signature; some refer to a constant created at run time (curses.ACS_VLINE).
    except (ValueError, TypeError, AttributeError):
        return ""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty, default=_stable_default(parameter.default))
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(parameters))


class _Ellipsis:
    """Replaces a default that would make the dataset depend on more than the interpreter."""

    def __repr__(self) -> str:
        return "..."


def _stable_default(default: Any) -> Any:
    """Return short plain values unchanged, and "..." for sets (hash order), objects (addresses) and long strings
    (paths)."""
    if default is inspect.Parameter.empty or default is None or default is Ellipsis:
        return default
    if type(default) in (bool, int, float, complex):
        return default
    if type(default) in (str, bytes):
        return default if len(default) <= 20 else _Ellipsis()
    if type(default) in (tuple, list, dict) and not default:
        return default
    return _Ellipsis()


def _without_addresses(text: str) -> str:
    """Mask memory addresses: docstrings created at run time may contain the repr of an object."""
    return re.sub(r"\bat 0x[0-9a-fA-F]+", "at 0x...", text)


def _main() -> None:
    """Print the documentation to stdout. Output that modules print when imported is redirected to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    _print_documentation(out)
    out.close()


if __name__ == "__main__":
    _main()
