"""Convert rows to the input of a chat template: reasoning is separated from content, and special tokens are escaped.

A special token in the text of a message must not delimit messages, so it is replaced by its index between Unicode
noncharacters, which the template copies as text. tokenize.py encodes it as ordinary text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunery.models.template_rendering import (
    Message,
    RejectedConversation,
    TemplateProfile,
    TemplateRenderer,
    number_calls,
)
from tunery.store.rows import Row

ESCAPED = re.compile("\ufdd2([0-9]+)\ufdd3")
"""An escaped special token in a message's text: an index into `TemplateRenderer.control_tokens`."""
_TEXT_FIELDS = ("content", "reasoning_content", "name", "tool_call_id")
"""Text fields of a message, without its tool calls."""
_NONCHARACTERS = re.compile("[\ufdd0-\ufdef]")
_THINKING = re.compile(r"\s*<think>(?P<reasoning>.*?)</think>(?P<content>.*)", re.DOTALL)


@dataclass(frozen=True)
class TemplateInput:
    """A row as input of a chat template."""

    messages: list[Message]
    tools: Any
    """Definitions of tools, or None."""
    escaped_tokens: int
    """Number of special tokens in the text of messages and tools."""


def template_input(row: Row, template: TemplateRenderer, delimiters: re.Pattern[str]) -> TemplateInput:
    """Convert a row with `messages`. Raises RejectedConversation for a row that the template does not support.

    `delimiters`: matches the special tokens to escape in responses. In other texts all special tokens are escaped.
    """
    row_messages = row["messages"]
    message_text = "".join(str(message.get(name) or "") for message in row_messages for name in _TEXT_FIELDS)
    tools = (json.loads(row["tools"]) if row.get("tools") else None) or None
    if _NONCHARACTERS.search(message_text) or (tools and _NONCHARACTERS.search(json.dumps(tools, ensure_ascii=False))):
        raise RejectedConversation("it contains Unicode noncharacters (U+FDD0 to U+FDEF)")
    _check_supported(row_messages, tools, template.profile)
    messages = [_convert_message(message, template) for message in row_messages]
    if template.profile.call_ids:
        number_calls(messages)
    num_escaped = 0
    if template.control.search(message_text) or any(message.get("tool_calls") for message in row_messages):
        for message in messages:
            pattern = delimiters if message["role"] == "assistant" else template.control
            num_escaped += _escape_message(message, pattern, template.control_tokens)
    if tools is not None:
        tools, count = _escape(tools, template.control, template.control_tokens)
        num_escaped += count
    return TemplateInput(messages, tools, num_escaped)


def _check_supported(row_messages: Sequence[Mapping[str, Any]], tools: Any, profile: TemplateProfile) -> None:
    """Raise RejectedConversation if the template does not support tool calls, their results or tool definitions."""
    if not profile.tool_calls and any(message.get("tool_calls") for message in row_messages):
        raise RejectedConversation("the chat template does not render tool calls")
    if not profile.tool_results and any(message["role"] == "tool" for message in row_messages):
        raise RejectedConversation("the chat template does not render tool results")
    if tools and not profile.tools:
        raise RejectedConversation("the chat template does not render the definitions of tools")


def _convert_message(row_message: Mapping[str, Any], template: TemplateRenderer) -> Message:
    """Convert a message of a row: without empty fields, and with parsed tool calls."""
    content = row_message["content"] or ""
    message: Message = {"role": row_message["role"], "content": content}
    for name in ("name", "tool_call_id"):
        if row_message.get(name):
            message[name] = row_message[name]
    reasoning = row_message.get("reasoning_content") or ""
    reasoning = reasoning if reasoning.strip() else ""
    if not reasoning and template.profile.reasoning and row_message["role"] == "assistant":
        reasoning, message["content"] = inline_reasoning(content) or ("", content)
    if reasoning:
        message["reasoning_content"] = reasoning
    if row_message.get("tool_calls"):
        message["tool_calls"] = [template.format_call(call) for call in json.loads(row_message["tool_calls"])]
        if _NONCHARACTERS.search(json.dumps(message["tool_calls"], ensure_ascii=False)):
            raise RejectedConversation("a tool call contains Unicode noncharacters (U+FDD0 to U+FDEF)")
    return message


def inline_reasoning(content: str) -> tuple[str, str] | None:
    """Split `<think>reasoning</think>response` into reasoning and response; None for other content."""
    match = _THINKING.fullmatch(content)
    return None if match is None else (match["reasoning"].strip("\n"), match["content"].lstrip("\n"))


def _escape_message(message: Message, pattern: re.Pattern[str], tokens: Sequence[str]) -> int:
    """Escape special tokens in the message in place; return their number."""
    count = 0
    for name in (*_TEXT_FIELDS, "tool_calls"):
        if name in message:
            message[name], escaped = _escape(message[name], pattern, tokens)
            count += escaped
    return count


def _escape(value: Any, pattern: re.Pattern[str], tokens: Sequence[str]) -> tuple[Any, int]:
    """Escape special tokens in all strings of a JSON value; return the escaped value and their number. `tokens`: all
    tokens that `pattern` may match; an escape contains the index of its token."""
    if isinstance(value, str):
        return pattern.subn(lambda match: f"\ufdd2{tokens.index(match[0])}\ufdd3", value)
    if isinstance(value, list):
        items = [_escape(item, pattern, tokens) for item in value]
        return [item for item, _ in items], sum(count for _, count in items)
    if isinstance(value, dict):
        keys = [_escape(key, pattern, tokens) for key in value]
        items = [_escape(item, pattern, tokens) for item in value.values()]
        count = sum(count for _, count in (*keys, *items))
        return dict(zip((key for key, _ in keys), (item for item, _ in items), strict=True)), count
    return value, 0


def unescape(text: str, tokens: Sequence[str]) -> str:
    """Replace escaped special tokens by their text."""
    return ESCAPED.sub(lambda match: tokens[int(match[1])], text)
