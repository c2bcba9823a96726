"""Conversion of chat messages in the OpenAI format ({role, content, ..}) and the ShareGPT format ({from, value}) to one
format.

A message is {role, content}, with the optional fields of store.rows.Message if the file has them. The roles are system,
user, assistant and tool; ROLES lists their names in files, KEYS the names of the fields. A dataset stage may define
other names (`roles`, `message_keys`). Keys that are not read are recorded, so that the dataset stage can count them.
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
from tunery.store.rows import Message

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
"""Role by name in the file, ignoring case and surrounding white space; `function_call` is a message whose content is
the call."""

KEYS: Mapping[str, tuple[str, ...]] = {
    "role": ("role", "from"),
    "content": ("content", "value"),
    "tool_calls": ("tool_calls",),
    "reasoning_content": ("reasoning_content", "reasoning", "thinking"),
    "weight": ("weight",),
    "name": ("name",),
    "tool_call_id": ("tool_call_id",),
}
"""Keys in files for each field of a message. The first non-empty one is read."""
FUNCTION_CALL = "function_call"
"""A single call of a message, in the predecessor of `tool_calls`: {name, arguments}."""
TRAIN_FLAGS = ("train", "training", "loss")
"""For a message without a weight: keys with a boolean whether the message is trained on. Other types are
ignored (`loss` may be a number)."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that are text."""
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns and message keys that hold media."""
PLACEHOLDERS = ("<image>", "<video>", "<audio>")
"""Placeholders for media in a text."""


class MediaRow(InvalidRow):
    """A row with images, videos or audio."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: rows with images, videos or audio are not supported")


def text_message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def is_empty(value: Any) -> bool:
    """Return whether a value is null, blank, or an empty list or mapping."""
    return value is None or (not value.strip() if isinstance(value, str) else value == [] or value == {})


class MessageReader:
    """Reads messages, with the names of roles and keys of a dataset.

    `ignored` collects the names of keys that are not read, such as "messages[].lang"; the caller clears it.
    """

    def __init__(self, roles: Mapping[str, str] | None = None, keys: Mapping[Any, str] | None = None) -> None:
        self._roles = ROLES | {role_name(name): role for name, role in (roles or {}).items()}
        self._keys = {**KEYS, **{field: (key,) for field, key in (keys or {}).items()}}
        self._plain_keys = list(itertools.product(self._keys["role"], self._keys["content"]))
        self.ignored: set[str] = set()

    def read_messages(self, value: Any, what: str = "messages") -> list[Message]:
        """Return the messages of a list, of a single message, or of the JSON text of either (as in tables). Empty
        system messages are omitted. Raises InvalidRow."""
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            value = parsed_json(value, what)
        if isinstance(value, Mapping):
            value = [value]
        if isinstance(value, UnsupportedValue):
            raise InvalidRow(f"{what} {value.reason}")
        if not isinstance(value, list) or not value:
            raise InvalidRow(f"{what} is not a list of messages")
        messages = [message for number, item in enumerate(value, 1) if (message := self._read_message(item, number))]
        if not messages:
            raise InvalidRow(f"{what} has only an empty system message")
        return messages

    def ignore(self, name: str) -> None:
        self.ignored.add(name)

    def _read_message(self, item: Any, number: int) -> Message | None:
        if not isinstance(item, Mapping):
            raise InvalidRow(f"message {number} has no role or no content")
        if len(item) > 2:
            item = {key: value for key, value in item.items() if value is not None}
        if len(item) == 2 and (message := self._read_plain_message(item, number)):
            return message
        fields = _Fields(item, self._keys)
        file_role, content, calls = (fields.get(name) for name in ("role", "content", "tool_calls"))
        if is_empty(calls):
            calls = fields.get(FUNCTION_CALL)
        calls = None if is_empty(calls) else calls
        reasoning = fields.get("reasoning_content")
        if file_role is None:
            raise InvalidRow(f"message {number} has no role or no content")
        role = self._roles.get(role_name(file_role)) if isinstance(file_role, str | int) else None
        if role is None:
            raise InvalidRow(
                f"message {number} has the role {file_role!r:.40}: map it with `roles`; "
                f"known roles: {', '.join(sorted(self._roles))}"
            )
        if role == FUNCTION_CALL:
            role, content, calls = "assistant", "", content
        if calls is not None and role != "assistant":
            raise InvalidRow(f"message {number} has tool calls and the role {role}")
        if media := [key for key in MEDIA if key in item and not is_empty(item[key])]:
            raise MediaRow(f"message {number} has `{media[0]}`")
        if role != "assistant" or isinstance(reasoning, bool) or is_empty(reasoning):
            if not is_empty(reasoning):
                self.ignore("messages[].reasoning_content")
            reasoning = None
        text = _join_parts(content, number)
        if is_empty(text):
            if role == "system":
                return None
            if role == "tool":
                text = text or ""
            elif role == "assistant" and (calls is not None or reasoning is not None):
                text = ""
            elif content is None:
                raise InvalidRow(f"message {number} has no role or no content")
            else:
                raise InvalidRow(f"message {number} is empty")
        else:
            text = require_text(text, f"message {number}")
        message = text_message(role, text)
        if calls is not None:
            message["tool_calls"] = as_json(self._calls(calls, number), f"message {number}")
        if reasoning is not None:
            message["reasoning_content"] = require_text(
                _join_parts(reasoning, number), f"the reasoning of message {number}"
            )
        self._add_labels(message, fields, number)
        self.ignored.update(f"messages[].{key}" for key in fields.unread())
        return message

    def _read_plain_message(self, item: Mapping[str, Any], number: int) -> Message | None:
        """Return a message of a role and a text only, as most messages are, else None. This fast path saves two thirds
        of the reading time."""
        for role_key, content_key in self._plain_keys:
            file_role, content = item.get(role_key), item.get(content_key)
            if isinstance(file_role, str) and isinstance(content, str):
                break
        else:
            return None
        role = self._roles.get(file_role)
        if role is None or role == FUNCTION_CALL or not content or content.isspace():
            return None
        return text_message(role, content if content.isascii() else unicode_text(content, f"message {number}"))

    def _add_labels(self, message: Message, fields: _Fields, number: int) -> None:
        """Add weight, name and tool_call_id if present."""
        weight = _weight(fields, number)
        if weight is not None and message["role"] == "assistant":
            message["weight"] = weight
        elif weight:
            # Other messages are never trained on, so a weight of 0 has no effect either.
            self.ignore(f"messages[].weight of {message['role']}")
        name = fields.get("name", str)
        if not is_empty(name):
            message["name"] = unicode_text(name, f"the name of message {number}")
        if message["role"] == "tool" and not is_empty(call := fields.get("tool_call_id", str | int)):
            message["tool_call_id"] = unicode_text(str(call), f"the tool_call_id of message {number}")

    def _calls(self, calls: Any, number: int) -> list[Any]:
        """Convert OpenAI's list of tool calls, or ShareGPT's {name, arguments}, to OpenAI's format.

        Arguments become an object, because chat templates expect one: missing arguments are {}, and text that is not a
        JSON object (such as code for an interpreter) remains text.
        """
        if isinstance(calls, str):
            calls = parsed_json(calls, f"the tool call of message {number}")
        converted = []
        for call in calls if isinstance(calls, list) else [calls]:
            function = (call.get("function") or call) if isinstance(call, Mapping) else None
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise InvalidRow(f"message {number} has a tool call without a name")
            result = {"type": "function", "function": {"name": function["name"], "arguments": _arguments(function)}}
            if isinstance(id_ := call.get("id"), str | int) and not is_empty(id_):
                result = {"id": str(id_), **result}
            unread = {key for key in (*call, *function) if not is_empty(call.get(key, function.get(key)))}
            unread -= {"id", "type", "function", "name", "arguments"}
            self.ignored.update(f"messages[].tool_calls[].{key}" for key in unread)
            converted.append(result)
        return converted


class _Fields:
    """Access to the fields of a message without nulls by the names of KEYS; records which keys were not read."""

    def __init__(self, item: Mapping[str, Any], keys: Mapping[str, Sequence[str]]) -> None:
        self._item, self._keys = item, keys
        self._read: set[str] = set()

    def get(self, field: str, kind: Any = object) -> Any:
        """Return the first non-empty value, else the first that is not null; None if there is none of type `kind`."""
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
    value = fields.get("weight")
    if value is None:
        return next((float(trained) for key in TRAIN_FLAGS if (trained := fields.get(key, bool)) is not None), None)
    try:
        weight = float(value) if isinstance(value, int | float | Decimal) else math.nan
    except OverflowError:
        weight = math.inf
    if not (math.isfinite(weight) and weight >= 0):
        text = value.reason if isinstance(value, UnsupportedValue) else repr(value)
        raise InvalidRow(f"the weight of message {number} is {text:.40}, not a finite number >= 0")
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


def _join_parts(content: Any, number: int) -> Any:
    """Concatenate the parts of a content that is a list of text parts, as OpenAI's may be."""
    if not isinstance(content, list):
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and kind.removeprefix("input_").removesuffix("_url") in MEDIA:
            raise MediaRow(f"message {number} has a part that is not text, of type {kind!r:.40}")
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") in TEXT_PARTS]
    if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
        raise InvalidRow(f"message {number} has a part that is not text")
    return "".join(map(str, texts))


def tools_json(value: Any) -> str | None:
    """Return the JSON text of a list of tools in OpenAI's format, from a list or JSON text; None if empty.

    A bare function ({name, parameters}, as in `functions` and in ShareGPT) becomes {"type": "function", "function":
    ..}, as chat templates expect.
    """
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
    """Return the value as JSON text. Raises InvalidRow for values that JSON does not have."""

    def reject(part: object) -> Any:
        raise InvalidRow(
            f"{what} has a value that {part.reason}"
            if isinstance(part, UnsupportedValue)
            else f"{what} has a value of type {type(part).__name__}"
        )

    try:
        text = json.dumps(value, ensure_ascii=False, default=reject)
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, InvalidRow):
            raise
        raise InvalidRow(f"{what} can't be written as JSON: {error}") from None
    return unicode_text(text, what)


def require_text(value: Any, what: str) -> str:
    """Return the value if it is a non-blank string. Raises InvalidRow otherwise."""
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
        raise InvalidRow(f"{what} is not valid Unicode: it has a lone surrogate") from None
    return value
