"""From a file's own columns to the row schema: shapes recognised by their column names, or named by the user.

Which columns make which shape stands in COLUMN_PATTERNS, what a shape needs in ROW_BUILDERS; a row's shape is found by
its own columns, so one file may hold several. Names are compared without regard to case and surrounding white space.
What no shape reads is noted, so that the dataset can count it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tunery.ingest.formats.record import InvalidRow
from tunery.ingest.messages import (
    MEDIA,
    PLACEHOLDERS,
    MediaRow,
    MessageReader,
    is_empty,
    parsed_json,
    require_text,
    tools_json,
    turn,
)
from tunery.store.rows import Row, Turn

Columns = Mapping[Any, str]
Fields = Mapping[str, Any]
"""Values of a row by role."""
NAMELESS = "(a column without a name)"

COLUMN_PATTERNS = (
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
"""`role=column`, or one word where both have one name; `?` may be absent. The first layout that fits is taken. All but
`text` may have `system` and `tools` too (or `functions`, as OpenAI's older form calls them), those of a `prompt` or
`instruction` a `history`, those with an answer its `reasoning_content`."""


class UnknownColumns(ValueError):
    """No shape fits the columns found; the message lists them."""


@dataclass(frozen=True)
class Converter:
    """How rows of certain columns become rows of ours."""

    make: Callable[[Fields, MessageReader], Row]
    names: Mapping[str, str]
    """Role: column."""
    unread: tuple[str, ...]
    """Columns that no role reads."""
    media: tuple[str, ...]
    """Those of them that are called like pictures and the like."""
    named: bool
    """Whether the user named the columns: then others are left out by request, pictures too."""
    reader: MessageReader

    def __call__(self, row: Mapping[str, Any]) -> Row:
        """Raises InvalidRow. `reader.ignored` is what the row holds and the result does not."""
        self.reader.ignored.clear()
        made = self.make({role: row.get(name) for role, name in self.names.items()}, self.reader)
        if self.media:
            self._refuse_media(row, made)
        self.reader.ignored.update(str(name) or NAMELESS for name in self.unread if not is_empty(row.get(name)))
        return made

    def _refuse_media(self, row: Mapping[str, Any], made: Row) -> None:
        """A conversation with a picture is about it; a text (its caption) is one without. A string alone (an address)
        is no picture, unless there is a placeholder in the text."""
        for name in self.media:
            if made.get("messages") and not self.named and _holds_media(row.get(name)):
                raise MediaRow(f"the column `{name}` is not empty")
        texts = [made.get("text") or "", *(turn["content"] for turn in made.get("messages") or ())]
        for placeholder in PLACEHOLDERS:
            if any(placeholder in text for text in texts):
                raise MediaRow(f"the text holds {placeholder}, and there is a column `{self.media[0]}`")


def _holds_media(value: Any) -> bool:
    if isinstance(value, str):
        return value.lstrip()[:1] == "[" and value.strip() != "[]"
    if isinstance(value, list):
        return any(item is not None for item in value)
    if isinstance(value, Mapping):
        return any(item is not None for item in value.values())
    return isinstance(value, bytes)


def converter(found: Mapping[str, Any], columns: Columns | None, reader: MessageReader | None = None) -> Converter:
    """How a row with the columns of `found`, and values in the same of them, becomes a row of ours. Raises
    UnknownColumns."""
    names = _named(found, columns) if columns else _recognised(found)
    roles = set(names)
    for needed, allowed, make in ROW_BUILDERS:
        if set(needed.split()) <= roles <= set(needed.split()) | set(allowed.split()):
            unread = tuple(name for name in found if name not in names.values())
            media = tuple(name for name in unread if str(name).strip().lower() in MEDIA)
            return Converter(make, names, unread, media, bool(columns), reader or MessageReader())
    known = "; ".join(" + ".join(needed.split()) for needed, _, _ in ROW_BUILDERS)
    raise UnknownColumns(f"`columns` names {_list(names)}, but a shape is one of: {known}")


def _named(found: Mapping[str, Any], columns: Columns) -> dict[str, str]:
    if missing := [name for name in columns.values() if name not in found]:
        raise UnknownColumns(f"there is no column {_list(missing)}; columns found: {_list(found)}")
    return dict(columns)


def _recognised(found: Mapping[str, Any]) -> dict[str, str]:
    """The first layout whose columns are there. In a table of several shapes the columns of the others are empty: then
    the first whose columns are filled, unless an earlier one has them all and more (an answer may be missing, and its
    question is not a prompt for that)."""
    own = {str(name).strip().lower(): name for name in found} | {name: name for name in found}
    if "functions" in own:
        own.setdefault("tools", own["functions"])
    fitting: list[tuple[set[str], dict[str, str]]] = []
    for layout in _LAYOUTS:
        needed = {name for name, optional in layout.values() if not optional}
        if needed <= own.keys():
            fitting.append((needed, {role: own[name] for role, (name, _) in layout.items() if name in own}))
    if not fitting:
        raise UnknownColumns(f"no known shape fits; columns found: {_list(found)}")
    for index, (needed, names) in enumerate(fitting):
        if all(found[own[name]] is not None for name in needed) and not any(
            needed < more for more, _ in fitting[:index]
        ):
            return names
    return fitting[0][1]


def _parse_layout(layout: str) -> dict[str, tuple[str, bool]]:
    """role: (column, may be absent)."""
    words = layout.split()
    if layout != "text":
        words += ["system?", "tools?"]
    if {"prompt", "prompt=instruction"} & set(words):
        words.append("history?")
    if any(word.startswith("completion") for word in words):
        words.append("reasoning_content?")
    parsed = {}
    for word in words:
        role, _, name = word.removesuffix("?").partition("=")
        parsed[role] = (name or role, word.endswith("?"))
    return parsed


_LAYOUTS = [_parse_layout(layout) for layout in COLUMN_PATTERNS]


def _list(names: Any) -> str:
    """A file may have thousands of columns, or whole texts for names where its header is missing."""
    shown = [f"`{str(name)[:60]}`".encode("utf-8", "backslashreplace").decode() for name in itertools.islice(names, 30)]
    return ", ".join(shown) + (f" and {len(names) - 30} more" if len(names) > 30 else "") or "none"


def _text(fields: Fields, reader: MessageReader) -> Row:
    row: Row = {"text": require_text(fields["text"], "text")}
    return row | {"label": _label(fields["label"])} if "label" in fields else row


def _pair(fields: Fields, reader: MessageReader) -> Row:
    """Prompt and completion are texts, or turns each."""
    *before, answer = _answer(fields["completion"], "answer", reader)
    if not is_empty(reasoning := fields.get("reasoning_content")):
        if answer["role"] != "assistant" or "reasoning_content" in answer:
            raise InvalidRow("reasoning_content has no answer to stand before, or the answer has its own")
        answer = {**answer, "reasoning_content": require_text(reasoning, "reasoning_content")}
    return _conversation(fields, [*_prompt_turns(fields, reader), *before, answer], reader)


def _messages(fields: Fields, reader: MessageReader) -> Row:
    return _conversation(fields, reader.turns(fields["messages"]), reader)


def _prompt(fields: Fields, reader: MessageReader) -> Row:
    return _conversation(fields, _prompt_turns(fields, reader), reader)


def _preference(fields: Fields, reader: MessageReader) -> Row:
    """Chosen and rejected are answers to prompt or messages, or whole conversations with a common start."""
    chosen = _answer(fields.get("chosen", fields.get("completion")), "chosen", reader)
    rejected = _answer(fields["rejected"], "rejected", reader)
    if chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":
        common = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
        start, chosen, rejected = chosen[: len(common)], chosen[len(common) :], rejected[len(common) :]
        _note_unused_prompt(fields, start, reader)
    elif "messages" in fields:
        start = reader.turns(fields["messages"])
    elif "prompt" in fields:
        start = _prompt_turns(fields, reader)
    else:
        raise InvalidRow("chosen and rejected are answers, and there is no prompt")
    if chosen == rejected:
        raise InvalidRow("chosen and rejected are the same")
    if [[turn["role"] for turn in side] for side in (chosen, rejected)] != [["assistant"], ["assistant"]]:
        raise InvalidRow("chosen and rejected differ in more than their last turn, an assistant's")
    if not start or start[-1]["role"] == "assistant":
        raise InvalidRow("chosen and rejected have no question before them")
    return {**_conversation(fields, [*start, *chosen], reader), "rejected": rejected}


def _note_unused_prompt(fields: Fields, start: list[Turn], reader: MessageReader) -> None:
    """Whole conversations have their prompt in them; a column that says another one is not read."""
    contents = {turn["content"].strip() for turn in start}
    for role in ("prompt", "input", "history"):
        value = fields.get(role)
        if not is_empty(value) and not (isinstance(value, str) and value.strip() in contents) and value != start:
            reader.ignore(f"{role} beside whole conversations")


def _conversation(fields: Fields, found: list[Turn], reader: MessageReader) -> Row:
    """With what may stand in columns of its own: the system's turn, the tools, the label."""
    if not is_empty(system := fields.get("system")):
        if any(item["role"] == "system" and item["content"] != system for item in found):
            reader.ignore("messages[] of the system, beside the column of the system")
        found = [turn("system", require_text(system, "system")), *(item for item in found if item["role"] != "system")]
    row: Row = {"messages": found}
    if (tools := tools_json(fields.get("tools"))) is not None:
        row["tools"] = tools
    if "label" in fields:
        row["label"] = _label(fields["label"])
        if found[-1]["role"] != "assistant":
            raise InvalidRow("a rated row has no answer")
    return row


def _prompt_turns(fields: Fields, reader: MessageReader) -> list[Turn]:
    prompt, extra = fields["prompt"], fields.get("input")
    before = _history(fields.get("history"), reader)
    if isinstance(prompt, list | Mapping):
        if not is_empty(extra):
            reader.ignore("input beside a prompt of turns")
        return [*before, *reader.turns(prompt, "prompt")]
    prompt = require_text(prompt, "prompt")
    if is_empty(extra):
        return [*before, turn("user", prompt)]
    return [*before, turn("user", f"{prompt}\n\n{require_text(extra, 'input')}")]


def _history(value: Any, reader: MessageReader) -> list[Turn]:
    """Earlier turns: alpaca's list of (question, answer), such turns as messages have, or the JSON text of either."""
    if isinstance(value, str) and value.strip():
        value = parsed_json(value, "history")
    if is_empty(value):
        return []
    if not isinstance(value, list):
        raise InvalidRow(f"history is {type(value).__name__}, not a list of (question, answer)")
    if all(isinstance(item, Mapping) for item in value):
        return reader.turns(value, "history")
    earlier = []
    for number, item in enumerate(value, 1):
        if not isinstance(item, list) or len(item) != 2:
            raise InvalidRow(f"exchange {number} of history is no (question, answer)")
        question, answer = item
        earlier.append(turn("user", require_text(question, f"the question of exchange {number} of history")))
        earlier.append(turn("assistant", require_text(answer, f"the answer of exchange {number} of history")))
    return earlier


def _answer(value: Any, what: str, reader: MessageReader) -> list[Turn]:
    if isinstance(value, list | Mapping):
        return reader.turns(value, what)
    return [turn("assistant", require_text(value, what))]


def _label(value: Any) -> bool:
    known = {"true": True, "1": True, "good": True, "false": False, "0": False, "bad": False}
    found = known.get(str(value).strip().lower()) if isinstance(value, bool | int | str) else None
    if found is None:
        raise InvalidRow(
            f"label is {value!r:.40}, not true or false (1, 0; good, bad); name the `columns` to read rows without it"
        )
    return found


ROW_BUILDERS: tuple[tuple[str, str, Callable[[Fields, MessageReader], Row]], ...] = (
    ("chosen rejected", "prompt input history messages system tools", _preference),
    ("prompt completion rejected", "input history system tools", _preference),
    ("messages", "label system tools", _messages),
    ("prompt completion", "input history reasoning_content label system tools", _pair),
    ("text", "label", _text),
    ("prompt", "input history system tools", _prompt),
)
"""What a shape needs, what it may have besides, and how it is made. Roles are those of `columns`."""
