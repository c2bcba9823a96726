"""From a file's own columns to the row schema: shapes recognised by their column names, or named by the user.

Which columns make which shape stands in LAYOUTS, what a shape needs in FORMS; a row's shape is found by its own
columns, so one file may hold several. Names are compared without regard to case and surrounding white space.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from tunery.data.formats.record import BadRow
from tunery.data.turns import filled, tools_json, turn, turns
from tunery.store.rows import Row, Turn

Columns = Mapping[Any, str]
Fields = Mapping[str, Any]
"""Values of a row by role."""
Convert = Callable[[Mapping[str, Any]], Row]

ROLES = ("text", "prompt", "input", "completion", "messages", "chosen", "rejected", "label", "system", "tools")

LAYOUTS = (
    "prompt chosen rejected",
    "prompt=question chosen rejected",
    "prompt=instruction input? chosen rejected",
    "messages=conversations chosen rejected",
    "messages chosen rejected",
    "chosen rejected",
    "messages label=kto_tag",
    "messages label",
    "messages",
    "messages=conversations label=kto_tag",
    "messages=conversations label",
    "messages=conversations",
    "prompt=instruction input? completion=output label=kto_tag",
    "prompt=instruction input? completion=output",
    "prompt completion label=kto_tag",
    "prompt completion label",
    "prompt completion",
    "prompt=question completion=answer label=kto_tag",
    "prompt=question completion=answer",
    "prompt completion=response label=kto_tag",
    "prompt completion=response",
    "text",
    "prompt",
)
"""`role=column`, or one word where both have one name; `?` may be absent. The first layout that fits is taken, and
every one but `text` may have the columns `system` and `tools` too."""


class NoShape(ValueError):
    """No shape fits the columns found; the message lists them."""


def converter(found: Mapping[str, Any], columns: Columns | None) -> Convert:
    """How a row with the columns of `found`, and values in the same of them, becomes a row of ours. Raises NoShape."""
    names = _named(found, columns) if columns else _recognised(found)
    roles = set(names)
    for needed, allowed, make in FORMS:
        if set(needed.split()) <= roles <= set(needed.split()) | set(allowed.split()):
            return lambda row: make({role: row.get(name) for role, name in names.items()})
    known = "; ".join(" + ".join(needed.split()) for needed, _, _ in FORMS)
    raise NoShape(f"`columns` names {_list(names)}, but a shape is one of: {known}")


def _named(found: Mapping[str, Any], columns: Columns) -> dict[str, str]:
    if missing := [name for name in columns.values() if name not in found]:
        raise NoShape(f"there is no column {_list(missing)}; columns found: {_list(found)}")
    return dict(columns)


def _recognised(found: Mapping[str, Any]) -> dict[str, str]:
    """The first layout whose columns are there. In a table of several shapes the columns of the others are empty: then
    the first whose columns are filled, unless an earlier one has them all and more (an answer may be missing, and its
    question is not a prompt for that)."""
    own = {str(name).strip().lower(): name for name in found} | {name: name for name in found}
    fitting: list[tuple[set[str], dict[str, str]]] = []
    for layout in _LAYOUTS:
        needed = {name for name, optional in layout.values() if not optional}
        if needed <= own.keys():
            fitting.append((needed, {role: own[name] for role, (name, _) in layout.items() if name in own}))
    if not fitting:
        raise NoShape(f"no known shape fits; columns found: {_list(found)}")
    for index, (needed, names) in enumerate(fitting):
        if all(found[own[name]] is not None for name in needed) and not any(
            needed < more for more, _ in fitting[:index]
        ):
            return names
    return fitting[0][1]


def _parse_layout(layout: str) -> dict[str, tuple[str, bool]]:
    """role: (column, may be absent)."""
    parsed = {}
    for word in layout.split() if layout == "text" else [*layout.split(), "system?", "tools?"]:
        role, _, name = word.removesuffix("?").partition("=")
        parsed[role] = (name or role, word.endswith("?"))
    return parsed


_LAYOUTS = [_parse_layout(layout) for layout in LAYOUTS]


def _list(names: Any) -> str:
    """A file may have thousands of columns, or whole texts for names where its header is missing."""
    shown = [f"`{str(name)[:60]}`".encode("utf-8", "backslashreplace").decode() for name in itertools.islice(names, 30)]
    return ", ".join(shown) + (f" and {len(names) - 30} more" if len(names) > 30 else "") or "none"


def _text(fields: Fields) -> Row:
    row: Row = {"text": filled(fields["text"], "text")}
    return row | {"label": _label(fields["label"])} if "label" in fields else row


def _pair(fields: Fields) -> Row:
    """Prompt and completion are texts, or turns each."""
    answer = _answer(fields["completion"], "answer")
    return _conversation(fields, [*_prompt_turns(fields), *answer])


def _messages(fields: Fields) -> Row:
    return _conversation(fields, turns(fields["messages"]))


def _prompt(fields: Fields) -> Row:
    return _conversation(fields, _prompt_turns(fields))


def _preference(fields: Fields) -> Row:
    """Chosen and rejected are answers to prompt or messages, or whole conversations with a common start."""
    chosen = _answer(fields.get("chosen", fields.get("completion")), "chosen")
    rejected = _answer(fields["rejected"], "rejected")
    if chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":
        common = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
        start, chosen, rejected = chosen[: len(common)], chosen[len(common) :], rejected[len(common) :]
    elif "messages" in fields:
        start = turns(fields["messages"])
    elif "prompt" in fields:
        start = _prompt_turns(fields)
    else:
        raise BadRow("chosen and rejected are answers, and there is no prompt")
    if chosen == rejected:
        raise BadRow("chosen and rejected are the same")
    if [[turn["role"] for turn in side] for side in (chosen, rejected)] != [["assistant"], ["assistant"]]:
        raise BadRow("chosen and rejected differ in more than their last turn, an assistant's")
    if not start or start[-1]["role"] == "assistant":
        raise BadRow("chosen and rejected have no question before them")
    return {**_conversation(fields, [*start, *chosen]), "rejected": rejected}


def _conversation(fields: Fields, found: list[Turn]) -> Row:
    """With what may stand in columns of its own: the system's turn, the tools, the label."""
    if (system := fields.get("system")) is not None and (not isinstance(system, str) or system.strip()):
        found = [turn("system", filled(system, "system")), *(item for item in found if item["role"] != "system")]
    row: Row = {"messages": found}
    if (tools := tools_json(fields.get("tools"))) is not None:
        row["tools"] = tools
    if "label" in fields:
        row["label"] = _label(fields["label"])
        if found[-1]["role"] != "assistant":
            raise BadRow("a rated row has no answer")
    return row


def _prompt_turns(fields: Fields) -> list[Turn]:
    prompt, extra = fields["prompt"], fields.get("input")
    if isinstance(prompt, list | Mapping):
        return turns(prompt, "prompt")
    prompt = filled(prompt, "prompt")
    if extra is None or (isinstance(extra, str) and not extra.strip()):
        return [turn("user", prompt)]
    return [turn("user", f"{prompt}\n\n{filled(extra, 'input')}")]


def _answer(value: Any, what: str) -> list[Turn]:
    if isinstance(value, list | Mapping):
        return turns(value, what)
    return [turn("assistant", filled(value, what))]


def _label(value: Any) -> bool:
    known = {"true": True, "1": True, "good": True, "false": False, "0": False, "bad": False}
    found = known.get(str(value).strip().lower()) if isinstance(value, bool | int | str) else None
    if found is None:
        raise BadRow(
            f"label is {value!r:.40}, not true or false (1, 0; good, bad); name the `columns` to read rows without it"
        )
    return found


FORMS: tuple[tuple[str, str, Callable[[Fields], Row]], ...] = (
    ("chosen rejected", "prompt input messages system tools", _preference),
    ("prompt completion rejected", "input system tools", _preference),
    ("messages", "label system tools", _messages),
    ("prompt completion", "input label system tools", _pair),
    ("text", "label", _text),
    ("prompt", "input system tools", _prompt),
)
"""What a shape needs, what it may have besides, and how it is made. Roles are those of `columns`."""
