"""Render a conversation with a model's chat template, with marks that locate the content of messages.

A template is a program from the model's folder. It is called as its `TemplateProfile` requires
(models/template_profile.py), and its errors become RejectedConversation with the template's message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Marks = dict[tuple[str, int], int]
"""Maps (kind, turn) to the character index of the mark; -1 if it was rendered twice, except for `content_end`, where
the last index counts. Kinds: `content`, `content_end`, `reasoning`, `reasoning_end`, and `call0_` for the name of a
message's first tool call."""

# Unicode noncharacters do not occur in text for interchange (https://www.unicode.org/faq/private_use.html#nonchar1).
_MARK = re.compile("\ufdd0([a-z_0-9]*[a-z_])([0-9]+)\ufdd1")


class RejectedConversation(ValueError):
    """The chat template can't render a conversation, or omits a part of it; the message has the reason."""


class UnsupportedTemplate(ValueError):
    """No method gives an exact mask for a chat template, or it fails on a simple conversation."""


@dataclass(frozen=True)
class ResponseHeader:
    """Text that the template puts between a user message and a response."""

    text: str
    generated_from: int
    """Index in `text` where it diverges from the generation prompt: the model generates the rest."""
    empty_thinking: bool
    """Whether that rest is a thinking block without content (Qwen3's `<think>\\n\\n</think>\\n\\n`)."""


@dataclass(frozen=True)
class TemplateProfile:
    """Behaviour of a chat template, determined by rendering small conversations."""

    generation_prompt: str = ""
    """Text that `add_generation_prompt` appends after a user message."""
    content_parts: bool = False
    """Whether content is passed as a list of parts, as in templates of vision-language models."""
    headers: tuple[ResponseHeader, ...] = ()
    closings: tuple[str, ...] = ()
    """Text after a response, up to and including its EOS token."""
    end_tokens: tuple[str, ...] = ()
    """Special tokens that end a generated response."""
    history_ends: tuple[str, ...] = ()
    """Tokens that the template writes after earlier responses but also within a response, so that they don't end a
    generated response (gpt-oss writes `<|end|>` after earlier responses, but the model generates `<|return|>`)."""
    appended_end: str = ""
    """EOS token that the template omits after the last message (GLM-4.5); "" if it writes one."""
    unclosed: str = ""
    """Text that the template writes after the last message instead of an EOS token."""
    generation_blocks: bool = False
    system: bool = True
    multi_turn: bool = True
    prefix: bool = True
    """Whether a response starts with the generation prompt."""
    reasoning: bool = False
    """Whether `reasoning_content` of the last message is rendered."""
    earlier_reasoning: bool = False
    """Whether `reasoning_content` of earlier messages is rendered."""
    thinking_model: bool = False
    """Whether the template contains `</think>`, even if it renders no reasoning."""
    tool_calls: bool = False
    tool_results: bool = False
    tools: bool = False
    arguments_as_text: bool = False
    """Whether arguments of tool calls are passed as JSON text instead of an object."""
    call_content: str | None = ""
    """Content passed for a message that has tool calls but no text."""
    call_ids: bool = False
    """Whether tool calls need ids (Mistral: nine alphanumeric characters)."""
    call_end: str = ""
    """EOS token that the template omits if the last message has tool calls."""


class TemplateRenderer:
    """Renders a tokenizer's chat template as `profile` requires."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.source = tokenizer.chat_template
        self.profile = TemplateProfile()
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
        literal = json.dumps(self.source, ensure_ascii=False)
        markup = {token.content for token in added if token.content in literal and not token.content.isspace()}
        self.special_tokens = frozenset(token for token in special if token.strip())
        """Special tokens of the tokenizer."""
        self.control_tokens = tuple(sorted(self.special_tokens | markup))
        """Special tokens, and added tokens that the template writes (`<tool_call>`)."""
        self.special = any_of(self.special_tokens)
        self.control = any_of(self.control_tokens)

    def render(
        self, messages: Sequence[Message], tools: Any = None, generation_prompt: bool = False, **options: Any
    ) -> str:
        """Render messages. Raises RejectedConversation with the template's message."""
        text, _ = self.rendered(messages, tools, generation_prompt, blocks=False, **options)
        return text

    def rendered(
        self, messages: Sequence[Message], tools: Any, generation_prompt: bool, blocks: bool, **options: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render messages. Return the text and, with `blocks`, the (start, end) characters of the generation blocks.
        Raises RejectedConversation with the template's message."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=self.tokenizer.get_chat_template(None, tools),
                return_assistant_tokens_mask=blocks,
                add_generation_prompt=generation_prompt,
                **{**self.tokenizer.special_tokens_map, **options},
            )
        except Exception as error:  # a template may raise any exception
            raise RejectedConversation(f"the chat template fails: {first_line(error)}") from error
        return texts[0], [tuple(span) for span in spans[0]] if blocks else []

    def marked(
        self, messages: Sequence[Message], tools: Any, generation_prompt: bool = False
    ) -> tuple[str, Marks | None]:
        """Return the rendered text and the marks of each message's content; None if marks change the rendering."""
        given = [self.given(message) for message in messages]
        text = self.render(given, tools, generation_prompt)
        marked = [self.given(with_marks(message, turn)) for turn, message in enumerate(messages)]
        try:
            raw = self.render(marked, tools, generation_prompt)
        except RejectedConversation:
            return text, None
        marks: Marks = {}
        plain: list[str] = []
        length = at = 0
        for match in _MARK.finditer(raw):
            plain.append(raw[at : match.start()])
            length += match.start() - at
            at = match.end()
            key = (match[1], int(match[2]))
            if key in marks and key[0] != "content_end":
                marks[key] = -1  # rendered twice: the position is ambiguous
            else:
                marks[key] = length
        plain.append(raw[at:])
        return text, marks if "".join(plain) == text else None

    def given(self, message: Message) -> Message:
        """Return a message as the template expects it: content as parts, reasoning under all names in use."""
        given = dict(message)
        if "reasoning_content" in given:
            given["reasoning"] = given["thinking"] = given["reasoning_content"]
        if given.get("tool_calls") and not given["content"]:
            given["content"] = self.profile.call_content
        if self.profile.content_parts and isinstance(given["content"], str):
            given["content"] = [{"type": "text", "text": given["content"]}]
        return given

    def call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Return a tool call with its arguments as the template expects them: an object or JSON text."""
        function = dict(call["function"])
        arguments = function.get("arguments", {})
        if self.profile.arguments_as_text and not isinstance(arguments, str):
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        elif not self.profile.arguments_as_text and isinstance(arguments, str):
            try:
                function["arguments"] = json.loads(arguments)
            except ValueError:
                pass  # keep text that is not JSON
        return {**call, "function": function}

    def before(self, messages: Sequence[Message], tools: Any) -> str:
        """Render messages without the generation prompt. Some templates write a token after a conversation without
        generation prompt (Phi-3's `<|endoftext|>`), so the common prefix of both renderings is returned."""
        given = [self.given(item) for item in messages]
        prompt = self.render(given, tools, generation_prompt=True)
        return prompt[: self.shared_prefix(prompt, self.render(given, tools))]

    def shared_prefix(self, prompt: str, text: str) -> int:
        """Return the length of the common prefix, shortened so that it does not end within a control token."""
        common = common_prefix(prompt, text)
        for match in (*self.control.finditer(prompt), *self.control.finditer(text)):
            if match.start() < common < match.end():
                common = match.start()
        return common


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the tokens, longest first; nothing without tokens."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def last_match(pattern: re.Pattern[str], text: str, start: int, end: int) -> re.Match[str] | None:
    matches = list(pattern.finditer(text, start, end))
    return matches[-1] if matches else None


def common_prefix(one: str, other: str) -> int:
    """Length of the common prefix."""
    if other.startswith(one):
        return len(one)
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{lines[0] if lines else ''}" or type(error).__name__


def with_marks(message: Message, turn: int) -> Message:
    """Add marks to a message, inside the outer white space, which a template may strip."""
    marked = dict(message)
    for name, kind in (("content", "content"), ("reasoning_content", "reasoning")):
        if core := message.get(name, "").strip():
            before, behind = message[name].split(core, 1)
            marked[name] = f"{before}\ufdd0{kind}{turn}\ufdd1{core}\ufdd0{kind}_end{turn}\ufdd1{behind}"
    if message.get("tool_calls"):
        marked["tool_calls"] = [
            {**call, "function": {**call["function"], "name": f"\ufdd0call{n}_{turn}\ufdd1{call['function']['name']}"}}
            for n, call in enumerate(message["tool_calls"])
        ]
    return marked


def number_calls(messages: Sequence[Message]) -> None:
    """Assign ids to tool calls and results that have none, in order."""
    pending: list[str] = []
    count = 0
    for message in messages:
        for call in message.get("tool_calls", ()):
            count += 1
            call.setdefault("id", f"call{count:05d}")
            pending.append(call["id"])
        if message["role"] == "tool" and "tool_call_id" not in message and pending:
            message["tool_call_id"] = pending.pop(0)
