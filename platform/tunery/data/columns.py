"""From a file's own columns to the row schema: shapes recognised by their column names, or named by the user.

text                                      text
messages                                  conversation, [{role, content}, ..]
prompt + completion | response            conversation
question + answer                         conversation
instruction (+ input) + output            conversation (the alpaca form)
prompt + chosen + rejected                preference pair
prompt alone                              prompt
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tunery.store.rows import Row

Columns = Mapping[Any, str]
Convert = Callable[[Mapping[str, Any]], Row]


class BadRow(ValueError):
    """A row that can't be used; the message is the reason, for the quarantine."""


class NoShape(ValueError):
    """No shape fits the columns found; the message lists them."""


def converter(found: Mapping[str, Any], columns: Columns | None) -> Convert:
    """How a row with the columns of `found` becomes a row of ours. Raises NoShape."""
    if columns:
        if missing := [name for name in columns.values() if name not in found]:
            raise NoShape(f"there is no column {_list(missing)}; columns found: {_list(found)}")
        for roles, make in _BY_ROLE:
            if set(roles) == set(columns):
                return lambda row: make(*(row.get(columns[role]) for role in roles))
        known = "; ".join(" + ".join(roles) for roles, _ in _BY_ROLE)
        raise NoShape(f"`columns` names {_list(columns)}, but a shape is one of: {known}")
    for names, make in _BY_NAME:
        required = [name.rstrip("?") for name in names if not name.endswith("?")]
        if all(name in found for name in required):
            fields = [name.rstrip("?") for name in names]
            return lambda row: make(*(row.get(field) for field in fields))
    raise NoShape(f"no known shape fits; columns found: {_list(found)}")


def _list(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _text(text: Any) -> Row:
    return {"text": _filled(text, "text")}


def _pair(prompt: Any, completion: Any) -> Row:
    return {"messages": [_turn("user", _filled(prompt, "prompt")), _turn("assistant", _filled(completion, "answer"))]}


def _alpaca(instruction: Any, extra: Any, output: Any) -> Row:
    prompt = _filled(instruction, "instruction")
    if extra is not None and not isinstance(extra, str):
        raise BadRow(f"input is {type(extra).__name__}, not text")
    return _pair(f"{prompt}\n\n{extra}" if extra and extra.strip() else prompt, output)


def _prompt(prompt: Any) -> Row:
    if isinstance(prompt, list):
        return {"messages": _turns(prompt)}
    return {"messages": [_turn("user", _filled(prompt, "prompt"))]}


def _preference(prompt: Any, chosen: Any, rejected: Any) -> Row:
    turns = _prompt(prompt)["messages"]
    return {
        "messages": [*turns, _turn("assistant", _filled(chosen, "chosen"))],
        "rejected": [_turn("assistant", _filled(rejected, "rejected"))],
    }


def _messages(messages: Any) -> Row:
    return {"messages": _turns(messages)}


_BY_NAME: list[tuple[tuple[str, ...], Callable[..., Row]]] = [
    (("messages",), _messages),
    (("prompt", "chosen", "rejected"), _preference),
    (("instruction", "input?", "output"), _alpaca),
    (("prompt", "completion"), _pair),
    (("prompt", "response"), _pair),
    (("question", "answer"), _pair),
    (("text",), _text),
    (("prompt",), _prompt),
]
_BY_ROLE: list[tuple[tuple[str, ...], Callable[..., Row]]] = [
    (("messages",), _messages),
    (("prompt", "completion", "rejected"), _preference),
    (("prompt", "completion"), _pair),
    (("text",), _text),
    (("prompt",), _prompt),
]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _turns(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise BadRow("messages is not a list of turns")
    turns = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise BadRow(f"turn {number} lacks role or content")
        if message["role"] not in ("system", "user", "assistant"):
            raise BadRow(f"turn {number} has the role {message['role']!r}, known: system, user, assistant")
        turns.append(_turn(message["role"], _filled(message["content"], f"turn {number}")))
    return turns


def _filled(value: Any, what: str) -> str:
    if value is None:
        raise BadRow(f"{what} is missing")
    if not isinstance(value, str):
        raise BadRow(f"{what} is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{what} is not Unicode: it holds half of a surrogate pair") from None
    return value
