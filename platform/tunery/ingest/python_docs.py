"""The corpus `builtin:python-docs`: the documentation that every Python carries with itself.

An experiment needs data before anyone has downloaded any. The interpreter's own docstrings and the language
reference in `pydoc_data.topics` are 1.8 MB of real technical prose, on every machine and under Python's
license.

The docstrings are read in a child interpreter: importing the whole standard library leaves hundreds of
modules, handlers and warnings filters behind, which the caller should not have to live with. The child is
this very file, run as a script (hence no import of the rest of the package here); it prints one JSON record
a line.

The corpus depends on the interpreter alone (see `identity`): no hash order, memory address or path gets in.
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

Subset = Literal["texts", "questions", "preferences", "damaged", "prompts"]
Row = dict[str, Any]

CORPUS_VERSION = 1
"""Raise it whenever a change of this file changes a row: caches are keyed by `identity`."""

ANSWER_CHARACTERS = 600
"""An answer is at most this long: about 150 tokens, which a small model can learn to say whole."""

SHORTEST_ANSWER = 20
"""Shorter docstrings ("abs(self)") say nothing that the name does not."""

PASSAGE_CHARACTERS = 2000
"""A text is cut in passages of at most this length, some 500 tokens: a short context then wastes little."""

QUOTED_PARAGRAPH = 60
"""A paragraph of this length that two topics have is a quotation; "For example:" and headings are not."""

CHILD_SECONDS = 120
"""Reading takes one to three seconds; on a machine loaded to its limits it may take many times that."""

SKIPPED_MODULES = frozenset(
    {
        "__main__",
        "antigravity",  # opens a browser
        "distutils",  # replaced by setuptools where that is installed, gone since Python 3.12
        "encodings",  # 120 generated code pages
        "ensurepip",
        "idlelib",
        "lib2to3",  # writes grammar caches, gone since Python 3.13
        "ntpath",  # os.path of one platform, as the next two are os
        "nt",
        "posix",
        "posixpath",
        "pydoc_data",  # read as topics
        "test",
        "tests",
        "this",  # prints a poem
        "tkinter",  # needs a display, as turtle does
        "turtle",
        "turtledemo",
        "xxlimited",  # examples of how to write a C module
        "xxlimited_35",
        "xxsubtype",
    }
)
"""Modules, and names of submodules anywhere, that are not imported."""

WORDINGS: dict[str, tuple[str, ...]] = {
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
    """A thing that Python documents, with its own (not an inherited) docstring.

    `name` is the qualified name ("os.path.join", "print"; "topic:if" for a topic of the language reference),
    `kind` one of module, class, function, method, property and topic, `signature` like "(a, *p)", without
    annotations, and "" when unknown, and `doc` the docstring as `inspect.cleandoc` leaves it.
    """

    name: str
    kind: str
    signature: str
    doc: str


# ----------------------------------------------------------------------------------------------------
# What the caller uses
# ----------------------------------------------------------------------------------------------------


def identity() -> str:
    """What the corpus depends on: equal identities mean equal rows. Costs nothing, reads nothing.

    Builds of one version can differ in optional modules (`dbm.gnu`, `curses`); see `unimportable_modules`.
    """
    version = ".".join(str(part) for part in sys.version_info)
    return f"python-docs-{CORPUS_VERSION}:{sys.implementation.name}-{version}-{sys.platform}"


@cache
def documented_objects() -> tuple[DocumentedObject, ...]:
    """Everything this Python documents, by name; no two with the same docstring.

    Raises RuntimeError when the child interpreter fails, with what it said.
    """
    return _read()[0]


def unimportable_modules() -> dict[str, str]:
    """Modules of the standard library that cannot be imported here (other platforms' own): the reasons."""
    return dict(_read()[1])


def rows(subset: Subset, wanted: Callable[[str], bool] = lambda group: True) -> Iterator[Row]:
    """The rows of a subset whose group is `wanted`, in the order of a hash of their names: the first n are a sample.

    Every row has `group`, the object's name: rows of one group belong in one split. Beside it stand

    - texts: `text`, a passage under a heading;
    - questions: `messages`, a question of the user about an object and the assistant's answer;
    - preferences: `messages` as in questions, and `rejected`, the answer that belongs to another wanted
      object of the kind (so that a split never shows another's answers);
    - damaged: the same pairs of questions and answers, and `rejected`, the answer itself damaged
    (ingest/corruption.py):
      what is better can be told from the answer alone, which a small model learns.
    - prompts: `messages`, the question alone.

    No answer occurs twice. Raises ValueError for an unknown subset.
    """
    makers: dict[str, Callable[[], Iterator[Row]]] = {
        "texts": _texts,
        "questions": _questions,
        "preferences": lambda: _preferences(wanted),
        "damaged": lambda: _damaged(wanted),
        "prompts": _prompts,
    }
    if subset not in makers:
        raise ValueError(f"builtin:python-docs has no subset {subset!r}: choose one of {', '.join(makers)}.")
    return (row for row in makers[subset]() if wanted(row["group"]))


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
    for thing, answer in _answers():
        yield {"messages": [_question(thing), _said("assistant", answer)], "group": thing.name}


def _prompts() -> Iterator[Row]:
    for thing, _ in _answers():
        yield {"messages": [_question(thing)], "group": thing.name}


def _preferences(wanted: Callable[[str], bool]) -> Iterator[Row]:
    """Each answer is rejected once: for the object after its own among the wanted ones of its kind."""
    answers = [(thing, answer) for thing, answer in _answers() if wanted(thing.name)]
    of_kind: dict[str, list[str]] = defaultdict(list)
    for thing, answer in answers:
        of_kind[thing.kind].append(answer)
    place: Counter[str] = Counter()
    for thing, answer in answers:
        others = of_kind[thing.kind]
        wrong = others[place[thing.kind] - 1]
        place[thing.kind] += 1
        if len(others) > 1:
            yield {
                "messages": [_question(thing), _said("assistant", answer)],
                "rejected": [_said("assistant", wrong)],
                "group": thing.name,
            }


def _damaged(wanted: Callable[[str], bool]) -> Iterator[Row]:
    from tunery.ingest.corruption import corrupt  # not at the top: this file is run by itself, too

    rows = [row for row in _questions() if wanted(row["group"])]
    for row, other in zip(rows, corrupt(rows, 1.0, seed=CORPUS_VERSION), strict=True):
        if row["messages"] != other["messages"]:
            yield {**row, "rejected": [other["messages"][-1]]}


@cache
def _answers() -> tuple[tuple[DocumentedObject, str], ...]:
    """Objects with their answers in the order of the rows.

    Two docstrings may differ only after the part that makes the answer. The object with the shortest name
    keeps such an answer and the others have none: apart in two splits, they would let a model be tested on
    what it was shown.
    """
    owner: dict[str, tuple[DocumentedObject, str]] = {}
    for thing in sorted(documented_objects(), key=_name_order):
        answer = _answer(thing.doc)
        if thing.kind != "topic" and len(answer) >= SHORTEST_ANSWER:
            owner.setdefault(_normalised(answer), (thing, answer))
    answer_of = dict(owner.values())
    return tuple((thing, answer_of[thing]) for thing in _by_hash(answer_of))


def _answer(doc: str) -> str:
    """The leading whole paragraphs, or sentences of a first paragraph too long; "" if not even one fits."""
    paragraphs = _leading(_paragraphs(doc), "\n\n")
    if not paragraphs:
        return " ".join(_leading(re.split(r"(?<=[.!?])\s+", _paragraphs(doc)[0]), " "))
    # A last paragraph like "Usage:" announces what was left out.
    while len(paragraphs) > 1 and paragraphs[-1].endswith(":"):
        paragraphs.pop()
    return "\n\n".join(paragraphs)


def _leading(parts: list[str], separator: str) -> list[str]:
    """As many of the first parts as an answer has room for."""
    length = 0
    for count, part in enumerate(parts):
        length += len(part) + (len(separator) if count else 0)
        if length > ANSWER_CHARACTERS:
            return parts[:count]
    return list(parts)


def _question(thing: DocumentedObject) -> dict[str, str]:
    wordings = WORDINGS[thing.kind]
    # Not the bytes that order the rows, or the first rows would all have the same wording.
    chosen = hashlib.sha256(thing.name.encode()).digest()[-1] % len(wordings)
    return _said("user", wordings[chosen].format(thing.name))


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _topics_without_quotations(topics: Iterable[DocumentedObject]) -> list[DocumentedObject]:
    """Topics without the paragraphs that a shorter topic has.

    The reference's chapters quote its sections whole ("compound" holds "if", "for", "while", ...): a sixth of
    it is there twice, which would put the same page in two splits.
    """
    seen: set[str] = set()
    result = []
    for topic in sorted(topics, key=lambda t: (len(t.doc), t.name)):
        title, *paragraphs = _paragraphs(topic.doc)
        long = [paragraph for paragraph in paragraphs if len(paragraph) >= QUOTED_PARAGRAPH]
        own: list[str] = []
        # A short one, be it a heading or "Note:", goes with what it introduces, the last with what it ends.
        kept = not long or _normalised(long[-1]) not in seen
        for paragraph in reversed(paragraphs):
            if len(paragraph) >= QUOTED_PARAGRAPH:
                kept = _normalised(paragraph) not in seen
            if kept:
                own.insert(0, paragraph)
        seen.update(_normalised(paragraph) for paragraph in paragraphs)
        if own:
            result.append(replace(topic, doc="\n\n".join([title, *own])))
    return result


def _passages(doc: str) -> Iterator[str]:
    """The text in pieces of at most PASSAGE_CHARACTERS.

    They are cut between paragraphs, within a longer one between lines; a line longer than that stays whole.
    """
    passage = ""
    for paragraph in _paragraphs(doc):
        long = len(paragraph) > PASSAGE_CHARACTERS
        for number, piece in enumerate(paragraph.split("\n") if long else [paragraph]):
            separator = "\n" if number else "\n\n"
            joined = passage + separator + piece if passage else piece
            if passage and len(joined) > PASSAGE_CHARACTERS:
                yield passage
                joined = piece
            passage = joined
    if passage:
        yield passage


def _paragraphs(doc: str) -> list[str]:
    return [p for p in re.split(r"\n(?:[ \t]*\n)+", doc) if p.strip()]


def _normalised(doc: str) -> str:
    """Equal for texts that a reader would call the same."""
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
    """Objects and unimportable modules, as this file prints them when run as a script.

    -I and -S keep the user's paths and site-packages out, where a .pth file can replace a standard module;
    -B keeps the child from writing into the installation.
    """
    command = [sys.executable, "-I", "-S", "-B", "-W", "ignore", "-X", "utf8", os.path.abspath(__file__)]
    child = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=CHILD_SECONDS,
        check=False,
    )
    if child.returncode != 0:
        raise RuntimeError(
            f"Reading the documentation failed: {' '.join(command)} ended with status {child.returncode}. "
            f"Run it by hand to see why. Its last words: {child.stderr[-2000:].strip() or '(none)'}"
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
    found = [*_documented(modules), *_topics()]
    once: dict[str, DocumentedObject] = {}
    for thing in sorted(found, key=_name_order):
        once.setdefault(_normalised(thing.doc), thing)
    for name in sorted(missing):
        print(json.dumps({"unimportable": name, "reason": missing[name]}), file=out)
    for thing in sorted(once.values(), key=lambda t: t.name):
        print(json.dumps(asdict(thing)), file=out)


def _import_standard_library() -> tuple[dict[str, types.ModuleType], dict[str, str]]:
    """Public modules and submodules by name, and the ones that would not be imported with the reason."""
    modules: dict[str, types.ModuleType] = {}
    missing: dict[str, str] = {}
    waiting = [*sorted(sys.stdlib_module_names | set(sys.builtin_module_names), reverse=True), "os.path"]
    while waiting:
        name = waiting.pop()
        last = name.rpartition(".")[2]
        if last.startswith("_") or last in SKIPPED_MODULES or name in modules:
            continue
        try:
            module = importlib.import_module(name)
        # Modules of other platforms fail in many ways, also by leaving.
        except (Exception, SystemExit) as error:
            missing[name] = f"{type(error).__name__}: {error}"
            continue
        modules[name] = module
        children = pkgutil.iter_modules(getattr(module, "__path__", ()))
        waiting += sorted((f"{name}.{child.name}" for child in children), reverse=True)
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
    """Classes and functions of the modules, each once under its best name."""
    names: dict[int, set[str]] = defaultdict(set)
    things: dict[int, Any] = {}
    for module_name, module in modules.items():
        for attribute, thing in _own_attributes(module_name, module):
            things[id(thing)] = thing
            names[id(thing)].add(f"{module_name}.{attribute}")
    for key, thing in things.items():
        yield _best_name(thing, names[key], modules).removeprefix("builtins."), thing


def _own_attributes(module_name: str, module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """Public classes and functions that a module offers as its own, not those it merely imports for its use.

    Those are the ones in `__all__`, the ones defined there, and without `__all__` also the ones from a
    private module, as the C half of `datetime` is.
    """
    exported = getattr(module, "__all__", None)
    for attribute, thing in sorted(vars(module).items()):
        if attribute.startswith("_") or not (isinstance(thing, type) or inspect.isroutine(thing)):
            continue
        home = getattr(thing, "__module__", None) or module_name
        defined_here = home == module_name or (exported is None and home.startswith("_"))
        if defined_here or (exported is not None and attribute in exported):
            yield attribute, thing


def _best_name(thing: Any, names: set[str], modules: dict[str, types.ModuleType]) -> str:
    """`__module__` and `__qualname__` where they are public and lead to the object, else its shortest name.

    A package that exports what its submodule defines goes before it: people say `asyncio.run`, not
    `asyncio.runners.run`.
    """
    home = getattr(thing, "__module__", None) or ""
    qualname = getattr(thing, "__qualname__", None) or "_"
    if not qualname.startswith("_") and getattr(modules.get(home), qualname, None) is thing:
        packages = {f"{package}.{qualname}" for package in _packages(home)}
        names = (names & packages) | {f"{home}.{qualname}"}
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
    """One object, or none when the docstring is missing, empty or no string (a class may compute it)."""
    text = _without_addresses(inspect.cleandoc(doc)).strip() if isinstance(doc, str) else ""
    if text:
        yield DocumentedObject(name, kind, _signature(thing), text)


def _signature(thing: object) -> str:
    if not callable(thing):
        return ""
    try:
        signature = inspect.signature(thing)
    # Not every C function tells its signature; some name a constant made at run time (curses.ACS_VLINE).
    except (ValueError, TypeError, AttributeError):
        return ""
    shown = [
        parameter.replace(annotation=inspect.Parameter.empty, default=_shown_default(parameter.default))
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(shown))


class _Ellipsis:
    """Shown in place of a default that would make the corpus depend on more than the interpreter."""

    def __repr__(self) -> str:
        return "..."


def _shown_default(default: Any) -> Any:
    """Short plain values as they are; sets (hash order), objects (addresses), long strings (paths): "..."."""
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
    """Docstrings made at run time may hold the repr of an object."""
    return re.sub(r"\bat 0x[0-9a-fA-F]+", "at 0x...", text)


def _main() -> None:
    """Print the documentation on what was stdout; modules that print while imported do it on stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    os.dup2(2, 1)
    _print_documentation(out)
    out.close()


if __name__ == "__main__":
    _main()
