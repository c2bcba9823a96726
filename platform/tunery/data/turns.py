"""Turns of conversations, in OpenAI's form ({role, content, tool_calls}) and sharegpt's ({from, value}), to one form.

A turn of ours is {role, content}, and `tool_calls` (JSON text of OpenAI's list) where an assistant calls tools.
Roles: system, user, assistant, tool; sharegpt's human, gpt, function_call and observation become user, assistant, an
assistant's tool call, and tool.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tunery.data.formats.record import BadRow, Unusable
from tunery.store.rows import Turn

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "function_call",
    "tool": "tool",
    "observation": "tool",
}
"""From a file's roles to ours; `function_call` is a turn whose content is the call."""


def turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def turns(value: Any, what: str = "messages") -> list[Turn]:
    """The turns of a list, of a single turn, or of the JSON text of either (as tables hold them). Raises BadRow."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = _parsed(value, what)
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, Unusable):
        raise BadRow(f"{what} {value.reason}")
    if not isinstance(value, list) or not value:
        raise BadRow(f"{what} is not a list of turns")
    return [_one_turn(item, number) for number, item in enumerate(value, 1)]


def _one_turn(item: Any, number: int) -> Turn:
    if not isinstance(item, Mapping):
        raise BadRow(f"turn {number} lacks role or content")
    given = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    calls = item.get("tool_calls")
    if given is None or (content is None and not calls):
        raise BadRow(f"turn {number} lacks role or content")
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        known = ", ".join(sorted(ROLES))
        raise BadRow(f"turn {number} has the role {given!r:.40}, known: {known}")
    if role == "function_call":
        role, content, calls = "assistant", "", content
    if calls is None or calls in ("", []):
        return turn(role, filled(_joined(content, number), f"turn {number}"))
    if role != "assistant":
        raise BadRow(f"turn {number} calls tools, and is the {role}'s")
    said = _joined(content, number)
    text = filled(said, f"turn {number}") if isinstance(said, str) and said.strip() else ""
    return {**turn(role, text), "tool_calls": as_json(_calls(calls, number), f"turn {number}")}


def _joined(content: Any, number: int) -> Any:
    """OpenAI's content may be a list of parts; those of text are one text."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) < max(1, len(content)) or not all(isinstance(text, str) for text in texts):
        raise BadRow(f"turn {number} has a part that is not text")
    return "".join(map(str, texts))


def _calls(calls: Any, number: int) -> list[Any]:
    """OpenAI's list of tool calls, from that or from sharegpt's {name, arguments}; arguments as an object, since that
    is what chat templates take."""
    if isinstance(calls, str):
        calls = _parsed(calls, f"the tool call of turn {number}")
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f"turn {number} calls a tool without a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                pass  # not JSON: the text stays the argument
        found.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def tools_json(value: Any) -> str | None:
    """JSON text of a list of tools, from a list or from such text; None for none."""
    if isinstance(value, str) and value.strip():
        value = _parsed(value, "tools")
    if value is None or value in ("", []) or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise BadRow("tools is not a list of tools")
    return as_json(value, "tools")


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow(f"{what} is not JSON") from None


def as_json(value: Any, what: str) -> str:
    """JSON text in one form. Raises BadRow for what JSON has not."""

    def refuse(part: object) -> Any:
        raise BadRow(f"{what} holds {f'what {part.reason}' if isinstance(part, Unusable) else type(part).__name__}")

    try:
        text = json.dumps(value, ensure_ascii=False, default=refuse)
    except (ValueError, TypeError, RecursionError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow(f"{what} can't be written as JSON: {error}") from None
    return unicode_text(text, what)


def filled(value: Any, what: str) -> str:
    """The text. Raises BadRow where it is missing, empty or no text."""
    if value is None:
        raise BadRow(f"{what} is missing")
    if isinstance(value, Unusable):
        raise BadRow(f"{what} {value.reason}")
    if not isinstance(value, str):
        raise BadRow(f"{what} is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(f"{what} is empty")
    return unicode_text(value, what)


def unicode_text(value: str, what: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{what} is not Unicode: it holds half of a surrogate pair") from None
    return value
