"""Render a conversation with a model's chat template, with marks that locate the content of messages.

A template is a program from the model's folder. Its input has the form that its `TemplateProfile` requires
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
"""Character index of each mark, by (kind, index of the message). It is -1 if the mark was rendered twice, except for
`content_end`, where it is the last index. Kinds: `content`, `content_end`, `reasoning`, `reasoning_end`, and `call0_`
for the name of the first tool call of a message."""

# Unicode noncharacters do not occur in text for interchange (https://www.unicode.org/faq/private_use.html#nonchar1).
_MARK = re.compile("\ufdd0([a-z_0-9]*[a-z_])([0-9]+)\ufdd1")


class RejectedConversation(ValueError):
    """The chat template can't render a conversation, or omits a part of it. The message has the reason."""


class UnsupportedTemplate(ValueError):
    """No method gives the exact responses of a chat template, or it fails on a simple conversation."""


@dataclass(frozen=True)
class ResponseHeader:
    """Text that the template puts between a user message and a response."""

    text: str
    generated_from: int
    """Index in `text` where it diverges from the generation prompt: the model generates the rest."""
    empty_thinking: bool
    """Whether the generated rest is a thinking block without content (Qwen3's `<think>\\n\\n</think>\\n\\n`)."""


@dataclass(frozen=True)
class TemplateProfile:
    """Behaviour of a chat template, determined by rendering small conversations."""

    generation_prompt: str = ""
    """Text that `add_generation_prompt` appends after a user message."""
    content_parts: bool = False
    """Whether content is passed as a list of parts, as in templates of vision-language models."""
    headers: tuple[ResponseHeader, ...] = ()
    """Texts between a user message and a response, longest first."""
    closings: tuple[str, ...] = ()
    """Texts after a response, up to and including its EOS token, longest first."""
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
    """Whether the template marks responses with `{% generation %}`."""
    system: bool = True
    """Whether system messages are rendered."""
    multi_turn: bool = True
    """Whether more than one prompt with a response can be rendered."""
    prefix: bool = True
    """Whether the prompt with the generation prompt is a prefix of the conversation with the response."""
    reasoning: bool = False
    """Whether `reasoning_content` of the last message is rendered."""
    earlier_reasoning: bool = False
    """Whether `reasoning_content` of earlier messages is rendered."""
    thinking_model: bool = False
    """Whether the template contains `</think>`, even if it renders no reasoning."""
    tool_calls: bool = False
    """Whether tool calls are rendered."""
    tool_results: bool = False
    """Whether messages with the role `tool` are rendered."""
    tools: bool = False
    """Whether definitions of tools are rendered."""
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
        source_text = json.dumps(self.source, ensure_ascii=False)
        markup = {token.content for token in added if token.content in source_text and not token.content.isspace()}
        self.special_tokens = frozenset(token for token in special if token.strip())
        """Special tokens of the tokenizer."""
        self.control_tokens = tuple(sorted(self.special_tokens | markup))
        """Special tokens, and added tokens that the template writes (`<tool_call>`)."""
        self.special = any_of(self.special_tokens)
        """Matches a special token."""
        self.control = any_of(self.control_tokens)
        """Matches a control token."""

    def render(
        self, messages: Sequence[Message], tools: Any = None, generation_prompt: bool = False, **options: Any
    ) -> str:
        """Render messages. Raises RejectedConversation with the template's message."""
        text, _ = self.render_with_blocks(messages, tools, generation_prompt, blocks=False, **options)
        return text

    def render_with_blocks(
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

    def render_marked(
        self, messages: Sequence[Message], tools: Any, generation_prompt: bool = False
    ) -> tuple[str, Marks | None]:
        """Return the rendered text, and the marks of the content of each message; None if marks change the rendering.
        Raises RejectedConversation with the template's message."""
        text = self.render([self.as_template_message(message) for message in messages], tools, generation_prompt)
        marked = [self.as_template_message(with_marks(message, index)) for index, message in enumerate(messages)]
        try:
            marked_text = self.render(marked, tools, generation_prompt)
        except RejectedConversation:
            return text, None
        marks: Marks = {}
        unmarked: list[str] = []
        length = position = 0  # of the unmarked text so far; in the marked text
        for match in _MARK.finditer(marked_text):
            unmarked.append(marked_text[position : match.start()])
            length += match.start() - position
            position = match.end()
            key = (match[1], int(match[2]))
            if key in marks and key[0] != "content_end":
                marks[key] = -1  # rendered twice, so the position is ambiguous
            else:
                marks[key] = length
        unmarked.append(marked_text[position:])
        return text, marks if "".join(unmarked) == text else None

    def as_template_message(self, message: Message) -> Message:
        """Return a message in the form that the template expects: content as text or parts, reasoning under all names
        that templates use."""
        template_message = dict(message)
        if "reasoning_content" in template_message:
            reasoning = template_message["reasoning_content"]
            template_message["reasoning"] = template_message["thinking"] = reasoning
        if template_message.get("tool_calls") and not template_message["content"]:
            template_message["content"] = self.profile.call_content
        if self.profile.content_parts and isinstance(template_message["content"], str):
            template_message["content"] = [{"type": "text", "text": template_message["content"]}]
        return template_message

    def format_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Return a tool call with its arguments in the form that the template expects: an object or JSON text."""
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

    def render_history(self, messages: Sequence[Message], tools: Any) -> str:
        """Return the text of messages before the generation prompt. Some templates write a token after a conversation
        without generation prompt (Phi-3's `<|endoftext|>`), so this is the common prefix of the renderings with and
        without generation prompt."""
        template_messages = [self.as_template_message(message) for message in messages]
        prompt = self.render(template_messages, tools, generation_prompt=True)
        return prompt[: self.shared_prefix(prompt, self.render(template_messages, tools))]

    def shared_prefix(self, prompt: str, text: str) -> int:
        """Return the length of the common prefix, shortened so that it does not end within a control token."""
        common = common_prefix(prompt, text)
        for match in (*self.control.finditer(prompt), *self.control.finditer(text)):
            if match.start() < common < match.end():
                common = match.start()
        return common


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the tokens, the longest first. Without tokens it matches nothing."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def last_match(pattern: re.Pattern[str], text: str, start: int, end: int) -> re.Match[str] | None:
    """Return the last match in `text[start:end]`."""
    matches = list(pattern.finditer(text, start, end))
    return matches[-1] if matches else None


def common_prefix(one: str, other: str) -> int:
    """Return the length of the common prefix."""
    if other.startswith(one):
        return len(one)
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class."""
    lines = str(error).strip().splitlines()
    return f"{lines[0] if lines else ''}" or type(error).__name__


def with_marks(message: Message, index: int) -> Message:
    """Return a message with marks, inside its leading and trailing white space, which a template may strip. `index`: of
    the message in the conversation."""
    marked = dict(message)
    for name, kind in (("content", "content"), ("reasoning_content", "reasoning")):
        if stripped := message.get(name, "").strip():
            before, after = message[name].split(stripped, 1)
            marked[name] = f"{before}\ufdd0{kind}{index}\ufdd1{stripped}\ufdd0{kind}_end{index}\ufdd1{after}"
    if message.get("tool_calls"):
        marked["tool_calls"] = [
            {
                **call,
                "function": {
                    **call["function"],
                    "name": f"\ufdd0call{call_index}_{index}\ufdd1{call['function']['name']}",
                },
            }
            for call_index, call in enumerate(message["tool_calls"])
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
