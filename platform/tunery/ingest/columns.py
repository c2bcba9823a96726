"""Conversion of records to the row schema. Row formats are recognized by column names, or set by the user.

COLUMN_PATTERNS lists the known sets of columns, ROW_BUILDERS the columns each row format requires. The format is
detected for each record, so one file may contain several. Names are compared ignoring case and surrounding white space.
Columns that are not read are recorded, so that the dataset stage can count them.
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
    text_message,
    tools_json,
)
from tunery.store.rows import Message, Row

Columns = Mapping[Any, str]
Fields = Mapping[str, Any]
"""Values of a record by column role."""
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
"""`role=column`, or one word if both have the same name; `?` marks an optional column. The first matching pattern is
used. All patterns except `text` may also have `system` and `tools` (or `functions`, OpenAI's older name), those with a
`prompt` or `instruction` also `history`, and those with a completion also `reasoning_content`."""


class UnknownColumns(ValueError):
    """The columns match no row format; the message lists them."""


@dataclass(frozen=True)
class Converter:
    """Converts records with a given set of columns to rows."""

    build: Callable[[Fields, MessageReader], Row]
    names: Mapping[str, str]
    """Column by role."""
    unread: tuple[str, ...]
    """Columns without a role."""
    media: tuple[str, ...]
    """Unread columns with the name of a media type."""
    named: bool
    """Whether the user set the columns; other columns, including media, are then ignored on purpose."""
    reader: MessageReader

    def __call__(self, record: Mapping[str, Any]) -> Row:
        """Convert a record to a row; `reader.ignored` then has its values that are not part of the row. Raises
        InvalidRow."""
        self.reader.ignored.clear()
        row = self.build({role: record.get(name) for role, name in self.names.items()}, self.reader)
        if self.media:
            self._reject_media(record, row)
        self.reader.ignored.update(str(name) or NAMELESS for name in self.unread if not is_empty(record.get(name)))
        return row

    def _reject_media(self, record: Mapping[str, Any], row: Row) -> None:
        """Raise MediaRow if the row depends on media: a conversation with media, or a text with a placeholder. A plain
        text (a caption) and a column that holds only a string (a URL) are accepted."""
        for name in self.media:
            if row.get("messages") and not self.named and _has_media(record.get(name)):
                raise MediaRow(f"the column `{name}` is not empty")
        texts = [row.get("text") or "", *(message["content"] for message in row.get("messages") or ())]
        for placeholder in PLACEHOLDERS:
            if any(placeholder in text for text in texts):
                raise MediaRow(f"the text contains {placeholder}, and there is a column `{self.media[0]}`")


def _has_media(value: Any) -> bool:
    if isinstance(value, str):
        return value.lstrip()[:1] == "[" and value.strip() != "[]"
    if isinstance(value, list):
        return any(item is not None for item in value)
    if isinstance(value, Mapping):
        return any(item is not None for item in value.values())
    return isinstance(value, bytes)


def converter(record: Mapping[str, Any], columns: Columns | None, reader: MessageReader | None = None) -> Converter:
    """Return the converter for records with the same columns as `record`, and nulls in the same columns. Raises
    UnknownColumns."""
    names = _user_columns(record, columns) if columns else _recognize_columns(record)
    roles = set(names)
    for needed, allowed, build in ROW_BUILDERS:
        if set(needed.split()) <= roles <= set(needed.split()) | set(allowed.split()):
            unread = tuple(name for name in record if name not in names.values())
            media = tuple(name for name in unread if str(name).strip().lower() in MEDIA)
            return Converter(build, names, unread, media, bool(columns), reader or MessageReader())
    known = "; ".join(" + ".join(needed.split()) for needed, _, _ in ROW_BUILDERS)
    raise UnknownColumns(f"`columns` names {_list(names)}, but the row formats are: {known}")


def _user_columns(record: Mapping[str, Any], columns: Columns) -> dict[str, str]:
    if missing := [name for name in columns.values() if name not in record]:
        raise UnknownColumns(f"there is no column {_list(missing)}; columns: {_list(record)}")
    return dict(columns)


def _recognize_columns(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the columns of the first matching pattern, by role.

    In a table with rows of several formats, the columns of other formats are null. The first pattern without null
    columns is therefore preferred, unless an earlier matching pattern has all of its columns and more: a row whose
    response is null is not a prompt.
    """
    by_name = {str(name).strip().lower(): name for name in record} | {name: name for name in record}
    if "functions" in by_name:
        by_name.setdefault("tools", by_name["functions"])
    matches: list[tuple[set[str], dict[str, str]]] = []
    for pattern in _PATTERNS:
        needed = {name for name, optional in pattern.values() if not optional}
        if needed <= by_name.keys():
            matches.append((needed, {role: by_name[name] for role, (name, _) in pattern.items() if name in by_name}))
    if not matches:
        raise UnknownColumns(f"no row format matches; columns: {_list(record)}")
    for index, (needed, names) in enumerate(matches):
        if all(record[by_name[name]] is not None for name in needed) and not any(
            needed < more for more, _ in matches[:index]
        ):
            return names
    return matches[0][1]


def _parse_pattern(pattern: str) -> dict[str, tuple[str, bool]]:
    """Return (column, optional) by role."""
    words = pattern.split()
    if pattern != "text":
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


_PATTERNS = [_parse_pattern(pattern) for pattern in COLUMN_PATTERNS]


def _list(names: Any) -> str:
    """Format at most 30 names, each truncated: a file may have thousands of columns, or texts as names if it has no
    header."""
    quoted = [
        f"`{str(name)[:60]}`".encode("utf-8", "backslashreplace").decode() for name in itertools.islice(names, 30)
    ]
    return ", ".join(quoted) + (f" and {len(names) - 30} more" if len(names) > 30 else "") or "none"


def _text(fields: Fields, reader: MessageReader) -> Row:
    row: Row = {"text": require_text(fields["text"], "text")}
    return row | {"label": _label(fields["label"])} if "label" in fields else row


def _pair(fields: Fields, reader: MessageReader) -> Row:
    """Build a row from prompt and completion, each a text or messages."""
    *before, response = _response(fields["completion"], "response", reader)
    if not is_empty(reasoning := fields.get("reasoning_content")):
        if response["role"] != "assistant" or "reasoning_content" in response:
            raise InvalidRow("reasoning_content has no response, or the response has its own")
        response = {**response, "reasoning_content": require_text(reasoning, "reasoning_content")}
    return _conversation(fields, [*_prompt_messages(fields, reader), *before, response], reader)


def _messages(fields: Fields, reader: MessageReader) -> Row:
    return _conversation(fields, reader.read_messages(fields["messages"]), reader)


def _prompt(fields: Fields, reader: MessageReader) -> Row:
    return _conversation(fields, _prompt_messages(fields, reader), reader)


def _preference(fields: Fields, reader: MessageReader) -> Row:
    """Build a row from chosen and rejected, which are responses to a prompt, or full conversations with a common
    start."""
    chosen = _response(fields.get("chosen", fields.get("completion")), "chosen", reader)
    rejected = _response(fields["rejected"], "rejected", reader)
    if chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant":
        common = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
        start, chosen, rejected = chosen[: len(common)], chosen[len(common) :], rejected[len(common) :]
        _note_unused_prompt(fields, start, reader)
    elif "messages" in fields:
        start = reader.read_messages(fields["messages"])
    elif "prompt" in fields:
        start = _prompt_messages(fields, reader)
    else:
        raise InvalidRow("chosen and rejected are responses without a prompt")
    if chosen == rejected:
        raise InvalidRow("chosen and rejected are the same")
    if [[message["role"] for message in side] for side in (chosen, rejected)] != [["assistant"], ["assistant"]]:
        raise InvalidRow("chosen and rejected differ in more than the last assistant message")
    if not start or start[-1]["role"] == "assistant":
        raise InvalidRow("chosen and rejected have no prompt")
    return {**_conversation(fields, [*start, *chosen], reader), "rejected": rejected}


def _note_unused_prompt(fields: Fields, start: list[Message], reader: MessageReader) -> None:
    """Record prompt columns as ignored if they differ from the prompt within the full conversations."""
    contents = {message["content"].strip() for message in start}
    for role in ("prompt", "input", "history"):
        value = fields.get(role)
        if not is_empty(value) and not (isinstance(value, str) and value.strip() in contents) and value != start:
            reader.ignore(f"{role}, which differs from the conversations")


def _conversation(fields: Fields, messages: list[Message], reader: MessageReader) -> Row:
    """Build a row from messages and the columns for the system message, the tools and the label."""
    if not is_empty(system := fields.get("system")):
        if any(item["role"] == "system" and item["content"] != system for item in messages):
            reader.ignore("system messages, replaced by the system column")
        others = (item for item in messages if item["role"] != "system")
        messages = [text_message("system", require_text(system, "system")), *others]
    row: Row = {"messages": messages}
    if (tools := tools_json(fields.get("tools"))) is not None:
        row["tools"] = tools
    if "label" in fields:
        row["label"] = _label(fields["label"])
        if messages[-1]["role"] != "assistant":
            raise InvalidRow("a row with a label has no response")
    return row


def _prompt_messages(fields: Fields, reader: MessageReader) -> list[Message]:
    prompt, extra = fields["prompt"], fields.get("input")
    before = _history(fields.get("history"), reader)
    if isinstance(prompt, list | Mapping):
        if not is_empty(extra):
            reader.ignore("input, not used with a prompt of messages")
        return [*before, *reader.read_messages(prompt, "prompt")]
    prompt = require_text(prompt, "prompt")
    if is_empty(extra):
        return [*before, text_message("user", prompt)]
    return [*before, text_message("user", f"{prompt}\n\n{require_text(extra, 'input')}")]


def _history(value: Any, reader: MessageReader) -> list[Message]:
    """Return the earlier messages, from Alpaca's list of (prompt, response), a list of messages, or the JSON text of
    either."""
    if isinstance(value, str) and value.strip():
        value = parsed_json(value, "history")
    if is_empty(value):
        return []
    if not isinstance(value, list):
        raise InvalidRow(f"history is {type(value).__name__}, not a list of (prompt, response)")
    if all(isinstance(item, Mapping) for item in value):
        return reader.read_messages(value, "history")
    earlier = []
    for number, item in enumerate(value):
        if not isinstance(item, list) or len(item) != 2:
            raise InvalidRow(f"history[{number}] is not (prompt, response)")
        prompt, response = item
        earlier.append(text_message("user", require_text(prompt, f"the prompt of history[{number}]")))
        earlier.append(text_message("assistant", require_text(response, f"the response of history[{number}]")))
    return earlier


def _response(value: Any, what: str, reader: MessageReader) -> list[Message]:
    if isinstance(value, list | Mapping):
        return reader.read_messages(value, what)
    return [text_message("assistant", require_text(value, what))]


def _label(value: Any) -> bool:
    known = {"true": True, "1": True, "good": True, "false": False, "0": False, "bad": False}
    label = known.get(str(value).strip().lower()) if isinstance(value, bool | int | str) else None
    if label is None:
        raise InvalidRow(
            f"label is {value!r:.40}, not true or false (1, 0; good, bad); set `columns` to read rows without it"
        )
    return label


ROW_BUILDERS: tuple[tuple[str, str, Callable[[Fields, MessageReader], Row]], ...] = (
    ("chosen rejected", "prompt input history messages system tools", _preference),
    ("prompt completion rejected", "input history system tools", _preference),
    ("messages", "label system tools", _messages),
    ("prompt completion", "input history reasoning_content label system tools", _pair),
    ("text", "label", _text),
    ("prompt", "input history system tools", _prompt),
)
"""(required roles, optional roles, builder) of each row format. Roles are those of `columns`."""
