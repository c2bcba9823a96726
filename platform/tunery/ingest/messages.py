"""Turns of conversations, in OpenAI's form ({role, content, ..}) and sharegpt's ({from, value}), to one form.

A turn of ours is {role, content}, with the optional fields of store.rows.Turn where the file has them. Roles: system,
user, assistant, tool; ROLES lists the names that files have for them, KEYS the names of the fields. A dataset stage may
name others (`roles`, `message_keys`). A key that nothing reads is noted, so that the dataset can count it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from tunery.ingest.formats.record import InvalidRow, UnsupportedValue
from tunery.spec.stages import role_name
from tunery.store.rows import Turn

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "function_call": "function_call",
    "tool_call": "function_call",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
"""From a file's roles to ours, without regard to case and surrounding white space; `function_call` is a turn whose
content is the call."""

KEYS: Mapping[str, tuple[str, ...]] = {
    "role": ("role", "from"),
    "content": ("content", "value"),
    "tool_calls": ("tool_calls",),
    "reasoning_content": ("reasoning_content", "reasoning", "thinking"),
    "weight": ("weight",),
    "name": ("name",),
    "tool_call_id": ("tool_call_id",),
}
"""A turn's field: the keys that files have for it. The first one that says something is read."""
FUNCTION_CALL = "function_call"
"""A turn's single call, in the form that came before `tool_calls`: {name, arguments}."""
TRAINED = ("train", "training", "loss")
"""Where a turn has no weight: keys whose truth value says whether it is trained. What is no truth value is not read
(`loss` may be a number that somebody measured)."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of those parts of a content that are text."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns, and keys of a turn, that hold what is no text."""
PLACEHOLDERS = ("<image>", "<video>", "<audio>")
"""What stands in a text for them."""


class MediaRow(InvalidRow):
    """A row with images, videos or audio."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: rows with images, videos or audio are not supported")


def turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, white space, an empty list or mapping."""
    return value is None or (not value.strip() if isinstance(value, str) else value == [] or value == {})


class MessageReader:
    """Reads turns, with the names that a dataset has for roles and keys.

    `ignored` collects what was read past without effect: names such as "messages[].lang". Whoever reads rows clears it.
    """

    def __init__(self, roles: Mapping[str, str] | None = None, keys: Mapping[Any, str] | None = None) -> None:
        self._roles = ROLES | {role_name(name): role for name, role in (roles or {}).items()}
        self._keys = {**KEYS, **{field: (key,) for field, key in (keys or {}).items()}}
        self._plain_keys = list(itertools.product(self._keys["role"], self._keys["content"]))
        self.ignored: set[str] = set()

    def turns(self, value: Any, what: str = "messages") -> list[Turn]:
        """The turns of a list, of a single turn, or of the JSON text of either (as tables hold them). An empty turn of
        the system is none. Raises InvalidRow."""
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            value = parsed_json(value, what)
        if isinstance(value, Mapping):
            value = [value]
        if isinstance(value, UnsupportedValue):
            raise InvalidRow(f"{what} {value.reason}")
        if not isinstance(value, list) or not value:
            raise InvalidRow(f"{what} is not a list of turns")
        read = [message for number, item in enumerate(value, 1) if (message := self._one_turn(item, number))]
        if not read:
            raise InvalidRow(f"{what} holds nothing but an empty turn of the system")
        return read

    def ignore(self, name: str) -> None:
        self.ignored.add(name)

    def _one_turn(self, item: Any, number: int) -> Turn | None:
        if not isinstance(item, Mapping):
            raise InvalidRow(f"turn {number} lacks role or content")
        if len(item) > 2:
            item = {key: value for key, value in item.items() if value is not None}
        if len(item) == 2 and (message := self._plain_turn(item, number)):
            return message
        fields = _Fields(item, self._keys)
        given, content, calls = (fields.take(name) for name in ("role", "content", "tool_calls"))
        if is_empty(calls):
            calls = fields.take(FUNCTION_CALL)
        calls = None if is_empty(calls) else calls
        reasoning = fields.take("reasoning_content")
        if given is None:
            raise InvalidRow(f"turn {number} lacks role or content")
        role = self._roles.get(role_name(given)) if isinstance(given, str | int) else None
        if role is None:
            raise InvalidRow(
                f"turn {number} has the role {given!r:.40}: say what it means with `roles`, "
                f"besides the known ones: {', '.join(sorted(self._roles))}"
            )
        if role == FUNCTION_CALL:
            role, content, calls = "assistant", "", content
        if calls is not None and role != "assistant":
            raise InvalidRow(f"turn {number} calls tools, and is the {role}'s")
        if media := [key for key in MEDIA if key in item and not is_empty(item[key])]:
            raise MediaRow(f"turn {number} has `{media[0]}`")
        if role != "assistant" or isinstance(reasoning, bool) or is_empty(reasoning):
            if not is_empty(reasoning):
                self.ignore("messages[].reasoning_content")
            reasoning = None
        text = _joined(content, number)
        if is_empty(text):
            if role == "system":
                return None
            if role == "tool":
                text = text or ""
            elif role == "assistant" and (calls is not None or reasoning is not None):
                text = ""
            elif content is None:
                raise InvalidRow(f"turn {number} lacks role or content")
            else:
                raise InvalidRow(f"turn {number} is empty")
        else:
            text = require_text(text, f"turn {number}")
        message = turn(role, text)
        if calls is not None:
            message["tool_calls"] = as_json(self._calls(calls, number), f"turn {number}")
        if reasoning is not None:
            message["reasoning_content"] = require_text(_joined(reasoning, number), f"the reasoning of turn {number}")
        self._add_labels(message, fields, number)
        self.ignored.update(f"messages[].{key}" for key in fields.unread())
        return message

    def _plain_turn(self, item: Mapping[str, Any], number: int) -> Turn | None:
        """The turn of a role and a text, as most are; None for any other. Saves two thirds of the time of reading."""
        for role_key, content_key in self._plain_keys:
            given, content = item.get(role_key), item.get(content_key)
            if isinstance(given, str) and isinstance(content, str):
                break
        else:
            return None
        role = self._roles.get(given)
        if role is None or role == FUNCTION_CALL or not content or content.isspace():
            return None
        return turn(role, content if content.isascii() else unicode_text(content, f"turn {number}"))

    def _add_labels(self, message: Turn, fields: _Fields, number: int) -> None:
        """Weight, name and tool_call_id, where the turn has them."""
        weight = _weight(fields, number)
        if weight is not None and message["role"] == "assistant":
            message["weight"] = weight
        elif weight:
            # Nothing is trained on other turns; a weight of 0 says as much.
            self.ignore(f"messages[].weight of {message['role']}")
        name = fields.take("name", str)
        if not is_empty(name):
            message["name"] = unicode_text(name, f"the name of turn {number}")
        if message["role"] == "tool" and not is_empty(call := fields.take("tool_call_id", str | int)):
            message["tool_call_id"] = unicode_text(str(call), f"the tool_call_id of turn {number}")

    def _calls(self, calls: Any, number: int) -> list[Any]:
        """OpenAI's list of tool calls, from that or from sharegpt's {name, arguments}; arguments as an object, since
        that is what chat templates take: none are {}, and text that is no JSON object (the code of an interpreter)
        stays text."""
        if isinstance(calls, str):
            calls = parsed_json(calls, f"the tool call of turn {number}")
        read = []
        for call in calls if isinstance(calls, list) else [calls]:
            function = (call.get("function") or call) if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise InvalidRow(f"turn {number} calls a tool without a name")
            own = {"type": "function", "function": {"name": function["name"], "arguments": _arguments(function)}}
            if isinstance(id_ := call.get("id"), str | int) and not is_empty(id_):
                own = {"id": str(id_), **own}
            unread = {key for key in (*call, *function) if not is_empty(call.get(key, function.get(key)))}
            unread -= {"id", "type", "function", "name", "arguments"}
            self.ignored.update(f"messages[].tool_calls[].{key}" for key in unread)
            read.append(own)
        return read


class _Fields:
    """The fields of one turn, which has no nulls, by the names of KEYS; and which of its keys nothing has read."""

    def __init__(self, item: Mapping[str, Any], keys: Mapping[str, Sequence[str]]) -> None:
        self._item, self._keys = item, keys
        self._read: set[str] = set()

    def take(self, field: str, kind: Any = object) -> Any:
        """The first value that says something, else the first that is not null; None where there is none of `kind`."""
        keys = self._keys.get(field, (field,))
        values = [
            (key, value) for key in keys if (value := self._item.get(key)) is not None and isinstance(value, kind)
        ]
        for key, value in sorted(values, key=lambda pair: is_empty(pair[1])):
            self._read.add(key)
            return value
        return None

    def unread(self) -> list[str]:
        return [key for key, value in self._item.items() if key not in self._read and not is_empty(value)]


def _weight(fields: _Fields, number: int) -> float | None:
    value = fields.take("weight")
    if value is None:
        return next((float(trained) for key in TRAINED if (trained := fields.take(key, bool)) is not None), None)
    try:
        weight = float(value) if isinstance(value, int | float | Decimal) else math.nan
    except OverflowError:
        weight = math.inf
    if not (math.isfinite(weight) and weight >= 0):
        shown = value.reason if isinstance(value, UnsupportedValue) else repr(value)
        raise InvalidRow(f"the weight of turn {number} is {shown:.40}, not a number of 0 or more")
    return weight


def _arguments(function: Mapping[str, Any]) -> Any:
    arguments = function.get("arguments")
    if is_empty(arguments):
        return {}
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return {} if parsed is None else parsed if isinstance(parsed, dict | list) else arguments
    return arguments


def _joined(content: Any, number: int) -> Any:
    """OpenAI's content may be a list of parts; those of text are one text."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind.removeprefix("input_").removesuffix("_url") in MEDIA:
            raise MediaRow(f"turn {number} has a part that is not text, of type {kind!r:.40}")
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") in TEXT_PARTS]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise InvalidRow(f"turn {number} has a part that is not text")
    return "".join(map(str, texts))


def tools_json(value: Any) -> str | None:
    """JSON text of a list of tools in OpenAI's form, from a list or from such text; None for none. A function that
    stands by itself ({name, parameters}, as in `functions` and in sharegpt) becomes {"type": "function", "function":
    ..}: that is what chat templates take."""
    if isinstance(value, str) and value.strip():
        value = parsed_json(value, "tools")
    if is_empty(value):
        return None
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise InvalidRow("tools is not a list of tools")
    bare = [isinstance(tool.get("name"), str) and "function" not in tool and "type" not in tool for tool in value]
    value = [
        {"type": "function", "function": tool} if is_bare else tool for tool, is_bare in zip(value, bare, strict=True)
    ]
    return as_json(value, "tools")


def parsed_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRow(f"{what} is not JSON") from None


def as_json(value: Any, what: str) -> str:
    """JSON text in one form. Raises InvalidRow for what JSON has not."""

    def refuse(part: object) -> Any:
        raise InvalidRow(
            f"{what} holds {f'what {part.reason}' if isinstance(part, UnsupportedValue) else type(part).__name__}"
        )

    try:
        text = json.dumps(value, ensure_ascii=False, default=refuse)
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, InvalidRow):
            raise
        raise InvalidRow(f"{what} can't be written as JSON: {error}") from None
    return unicode_text(text, what)


def require_text(value: Any, what: str) -> str:
    """The text. Raises InvalidRow where it is missing, empty or no text."""
    if value is None:
        raise InvalidRow(f"{what} is missing")
    if isinstance(value, UnsupportedValue):
        raise InvalidRow(f"{what} {value.reason}")
    if not isinstance(value, str):
        raise InvalidRow(f"{what} is {type(value).__name__}, not text")
    if not value.strip():
        raise InvalidRow(f"{what} is empty")
    return unicode_text(value, what)


def unicode_text(value: str, what: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRow(f"{what} is not Unicode: it holds half of a surrogate pair") from None
    return value
