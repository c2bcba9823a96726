"""Render conversations with a model's chat template, and find the characters that the model generates.

A template is a program: it may strip content, drop the reasoning of earlier messages, raise an error on a system
message, or add no EOS token after the last message. The text of a response is therefore never searched for in the
rendered conversation. Its boundaries come from the template, by one of three methods. A conversation for which none is
exact is rejected with the reason.

    generation blocks  the spans that the template marks with `{% generation %}`
    marks              the conversation is rendered again with Unicode noncharacters at both ends of each message's
                       content. If removing them gives the first rendering, their positions are exact
    prefixes           the messages before a response with the generation prompt, and the messages up to its end, are
                       rendered too. If both are prefixes of the complete text, their lengths are exact (tool calls)

The behaviour of a template is determined once, by rendering small conversations (`TemplateProfile`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tunery.models.template_input import inline_reasoning, template_input, unescape
from tunery.models.template_profile import alternating_messages, profile_of
from tunery.models.template_rendering import (
    Marks,
    Message,
    RejectedConversation,
    TemplateRenderer,
    UnsupportedTemplate,
    any_of,
    last_match,
)
from tunery.store.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ResponseSpan:
    """Characters of a rendered conversation that the model generates: a response with its EOS token."""

    start: int
    end: int
    message_index: int
    """Index of the assistant message in the conversation."""


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation rendered by a chat template."""

    text: str
    """Special tokens in the text of messages are escaped (models/template_input.py)."""
    spans: tuple[ResponseSpan, ...]
    """In order, one for each assistant message that is rendered completely."""
    dropped_reasoning: int
    """Number of assistant messages whose reasoning the template does not render. If the template supports thinking,
    such a message has no span unless it is the last one."""
    escaped_tokens: int
    """Number of special tokens in the text of messages."""


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Return the tokenizer's chat template with its cached profile. Raises UnsupportedTemplate."""
    return _cached_template(tokenizer, json.dumps(tokenizer.chat_template))


@lru_cache(maxsize=8)  # small, because it keeps the tokenizers alive
def _cached_template(tokenizer: PreTrainedTokenizerBase, source: str) -> ChatTemplate:
    """`source`: of the template, since a tokenizer's template may be changed."""
    return ChatTemplate(tokenizer)


class ChatTemplate(TemplateRenderer):
    """A chat template with its profile. Renders conversations and finds their responses."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UnsupportedTemplate if the template can't render a simple conversation, or gives no exact spans."""
        super().__init__(tokenizer)
        self.profile = profile_of(self)
        # A response may contain markup such as <think> and <tool_call>, but no tokens that delimit messages.
        count = 4 if self.profile.multi_turn else 2
        messages = [self.as_template_message(message) for message in alternating_messages(count)]
        rendered = self.render(messages) + self.render(messages[:1], generation_prompt=True)
        special_tokens = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
        self._end_tokens = (*self.profile.end_tokens, *self.profile.history_ends)
        delimiters = {*self.control.findall(rendered), *special_tokens, *self._end_tokens}
        self._delimiters = any_of(delimiters - {"<think>", "</think>"})
        try:
            self._spans(alternating_messages(2), None, mask_empty_thinking=True)
        except RejectedConversation as error:
            raise UnsupportedTemplate(str(error)) from error

    def conversation(self, row: Row, mask_empty_thinking: bool = True) -> RenderedConversation:
        """Render a row with `messages`, and find its responses. Raises RejectedConversation.

        mask_empty_thinking: an empty thinking block before a response counts as part of the prompt, although the model
        would generate it.
        """
        inputs = template_input(row, self, self._delimiters)
        rendered = self._spans(inputs.messages, inputs.tools, mask_empty_thinking)
        return replace(rendered, escaped_tokens=inputs.escaped_tokens)

    def prompt(self, row: Row) -> RenderedConversation:
        """Render a prompt with the generation prompt, and find its earlier responses. The text is the same as before
        the response in `conversation`. Raises RejectedConversation."""
        inputs = template_input(row, self, self._delimiters)
        messages, tools = inputs.messages, inputs.tools
        text, marks = self.render_marked(messages, tools, generation_prompt=True)
        self._check_complete(messages, marks)
        spans: tuple[ResponseSpan, ...] = ()
        if any(message["role"] == "assistant" for message in messages):
            rendered = self._spans(messages, tools, mask_empty_thinking=True)
            common = self.shared_prefix(text, rendered.text)
            spans = tuple(span for span in rendered.spans if span.end <= common)
        return RenderedConversation(text, spans, 0, inputs.escaped_tokens)

    def unescape(self, text: str) -> str:
        """Replace escaped special tokens by their text."""
        return unescape(text, self.control_tokens)

    def _spans(self, messages: list[Message], tools: Any, mask_empty_thinking: bool) -> RenderedConversation:
        """Render messages and find the responses. An EOS token that the template omits after the last message is
        appended."""
        text, marks = self.render_marked(messages, tools)
        self._check_complete(messages, marks)
        responses = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        spans: list[ResponseSpan] = []
        dropped_reasoning = 0
        blocks = self._generation_blocks(messages, tools, text, responses)
        for index in responses:
            message, is_last = messages[index], index == len(messages) - 1
            if not _has_content(message):
                continue
            if self._drops_reasoning(message, index, marks):
                dropped_reasoning += 1
                supports_thinking = self.profile.reasoning or self.profile.thinking_model
                if supports_thinking and not is_last:
                    continue  # the model would learn to respond without thinking
                if is_last and (with_reasoning := self._with_reasoning(messages, tools, text, marks)) is not None:
                    text, span = with_reasoning
                    return RenderedConversation(text, (*spans, span), dropped_reasoning - 1, 0)
            start, end = self._span(messages, tools, text, marks, index, mask_empty_thinking, blocks.get(index))
            if is_last and self._lacks_end(text, end, message):
                text = text[:end] + self._omitted_end(message)
                end = len(text)
            spans.append(ResponseSpan(start, end, index))
        return RenderedConversation(text, tuple(spans), dropped_reasoning, 0)

    def _span(
        self,
        messages: Sequence[Message],
        tools: Any,
        text: str,
        marks: Marks | None,
        index: int,
        mask_empty_thinking: bool,
        block: tuple[int, int] | None,
    ) -> tuple[int, int]:
        """Return start and end of a response in `text`. `block`: its generation block, if any. Some blocks include the
        generation prompt, which is not part of the response."""
        try:
            start = self._start(messages, tools, text, marks, index, mask_empty_thinking)
            end = block[1] if block else self._end(messages, tools, text, marks, index)
        except RejectedConversation:
            if block is None:
                raise
            start, end = block
        for token in self.profile.history_ends:
            if text.endswith(token, start, end):
                end -= len(token)
        return max(start, block[0]) if block else start, end

    def _check_complete(self, messages: Sequence[Message], marks: Marks | None) -> None:
        """Raise RejectedConversation if the template omits the content of a message, or changes the order."""
        if marks is None:
            return
        for index, message in enumerate(messages):
            content_start = marks.get(("content", index), -1)
            if message.get("tool_calls") and any(
                0 <= marks.get(("content", later), -1) < content_start for later in range(index + 1, len(messages))
            ):
                raise RejectedConversation(  # Gemma 4
                    f"the chat template renders the text of message {index + 1} (assistant) after the results of its "
                    "tool calls"
                )
            if message["content"].strip() and ("content_end", index) not in marks:
                beside = "beside the tool calls " if message.get("tool_calls") else ""
                raise RejectedConversation(
                    f"the chat template does not render the text {beside}of message {index + 1} ({message['role']})"
                )
            for call_index in range(len(message.get("tool_calls", ()))):
                if (f"call{call_index}_", index) not in marks:
                    raise RejectedConversation(
                        f"the chat template does not render tool call {call_index + 1} of message {index + 1} "
                        "(assistant)"
                    )

    def _generation_blocks(
        self, messages: Sequence[Message], tools: Any, text: str, responses: Sequence[int]
    ) -> dict[int, tuple[int, int]]:
        """Return start and end of the `{% generation %}` block of each response, including an EOS token directly after
        it. {} if the template has no blocks, or if they do not correspond to the responses."""
        if not self.profile.generation_blocks:
            return {}
        template_messages = [self.as_template_message(message) for message in messages]
        rendered, spans = self.render_with_blocks(template_messages, tools, False, blocks=True)
        if rendered != text or len(spans) != len(responses):
            return {}
        blocks = {}
        for index, (start, end) in zip(responses, spans, strict=True):
            if not any(text.endswith(token, start, end) for token in self._end_tokens):
                closing = next((closing for closing in self.profile.closings if text.startswith(closing, end)), "")
                end += len(closing)
            blocks[index] = (start, self._without_trailing_text(text, start, end))
        return blocks

    def _drops_reasoning(self, message: Message, index: int, marks: Marks | None) -> bool:
        """Whether the template does not render the reasoning of a message."""
        if marks is None:
            return False
        if message.get("reasoning_content"):
            return ("reasoning", index) not in marks
        # The content may contain inline reasoning. A template that splits it at </think> drops the text before.
        return bool(message["content"].strip()) and ("content", index) not in marks

    def _with_reasoning(
        self, messages: Sequence[Message], tools: Any, text: str, marks: Marks | None
    ) -> tuple[str, ResponseSpan] | None:
        """Return the text with the last response as a thinking model generates it, and its span, if the template drops
        all reasoning (DeepSeek-R1): generation prompt, reasoning, `</think>`, response and EOS token. None if that is
        not possible."""
        if not self.profile.thinking_model:
            return None
        index, message = len(messages) - 1, messages[-1]
        reasoning, content = message.get("reasoning_content"), message["content"]
        if not reasoning:
            if (inline := inline_reasoning(content)) is None:
                return None
            reasoning, content = inline
        prompt = self.render(
            [self.as_template_message(item) for item in messages[:-1]], tools, True, enable_thinking=True, thinking=True
        )
        if prompt.rstrip().endswith("</think>"):
            return None  # the model generates only responses without thinking
        opening = "" if prompt.endswith("<think>\n") else "\n" if prompt.endswith("<think>") else "<think>\n"
        if marks is None or ("content_end", index) not in marks or message.get("tool_calls"):
            return None
        closing = text[marks["content_end", index] : self._end(messages, tools, text, marks, index)]
        rendered = f"{prompt}{opening}{reasoning}\n</think>\n\n{content.lstrip(chr(10)).rstrip()}{closing}"
        if self._lacks_end(rendered, len(rendered), message):
            rendered += self.profile.appended_end
        return rendered, ResponseSpan(len(prompt), len(rendered), index)

    def _start(
        self,
        messages: Sequence[Message],
        tools: Any,
        text: str,
        marks: Marks | None,
        index: int,
        mask_empty_thinking: bool,
    ) -> int:
        """Return the start of a response: the end of its generation prompt."""
        message = messages[index]
        # The mark is after the leading white space of the content, of which the template may render any part.
        mark, content = -1, message["content"]
        if marks is not None and ("reasoning", index) in marks:
            mark, content = marks["reasoning", index], message["reasoning_content"]
        elif marks is not None:
            mark = marks.get(("content", index), -1)
        if mark >= 0:
            space = content[: len(content) - len(content.lstrip())]
            for header_end in (
                mark - num_kept
                for num_kept in range(len(space), -1, -1)
                if text.endswith(space[len(space) - num_kept :], 0, mark)
            ):
                for header in self.profile.headers:
                    if header.text and text.endswith(header.text, 0, header_end):
                        if header.empty_thinking and mask_empty_thinking:
                            return header_end
                        header_start, prompt = header_end - len(header.text), self.profile.generation_prompt
                        # Content may itself begin with the rest of the generation prompt (`<think>`).
                        is_prompt = text.startswith(prompt, header_start)
                        return header_start + (len(prompt) if is_prompt else header.generated_from)
        template_messages = [self.as_template_message(item) for item in messages[:index]]
        prompt = self.render(template_messages, tools, generation_prompt=True)
        header_start = len(prompt) - len(self.profile.generation_prompt)
        if mask_empty_thinking and prompt.endswith(self.profile.generation_prompt):
            for header in self.profile.headers:
                if header.empty_thinking and text.startswith(prompt[:header_start] + header.text):
                    return header_start + len(header.text)
        if text.startswith(prompt):
            return len(prompt)
        history = self.render_history(messages[:index], tools)
        if text.startswith(history):
            return len(history) + self.shared_prefix(prompt[len(history) :], text[len(history) :])
        raise RejectedConversation(f"the chat template gives no exact start of message {index + 1} (assistant)")

    def _end(self, messages: Sequence[Message], tools: Any, text: str, marks: Marks | None, index: int) -> int:
        """Return the end of a response, including its EOS token."""
        message, is_last = messages[index], index == len(messages) - 1
        # The mark is before the trailing white space of the content, of which the template may render any part.
        mark = -1 if marks is None or message.get("tool_calls") else marks.get(("content_end", index), -1)
        if mark >= 0:
            content = message["content"]
            space = content[len(content.rstrip()) :]
            for kept_space in (space[:num_kept] for num_kept in range(len(space), -1, -1)):
                for closing in self.profile.closings:
                    if text.startswith(kept_space + closing, mark):
                        return mark + len(kept_space) + len(closing)
                if is_last and self.profile.appended_end and text[mark:] == kept_space + self.profile.unclosed:
                    return mark + len(kept_space)
        if is_last:
            return self._without_trailing_text(text, mark if mark >= 0 else 0, len(text))
        prefix = self.render([self.as_template_message(item) for item in messages[: index + 1]], tools)
        if not text.startswith(prefix):
            return self._end_by_following_text(messages, tools, text, index)
        end = self._without_trailing_text(text, mark if mark >= 0 else 0, len(prefix))
        if not self._ends_with_special(text[:end]) and (following := self.special.match(text, end)):
            return following.end()  # the first token of the next message ends this one (GLM-4.5)
        if mark >= 0 and self.special.search(text, mark, end) is None:
            space = message["content"][len(message["content"].rstrip()) :]  # no EOS token follows
            return mark + len(space) if text.startswith(space, mark) else mark
        return end

    def _end_by_following_text(self, messages: Sequence[Message], tools: Any, text: str, index: int) -> int:
        """Return the end of a response if the template renders a message differently when it is the last one (Qwen3's
        thinking block). The text after the response is the same as after a short response in its place."""
        short = {"role": "assistant", "content": "w"}
        with_short, marks = self.render_marked([*messages[:index], short, *messages[index + 1 :]], tools)
        if marks is not None and (mark := marks.get(("content_end", index), -1)) >= 0:
            following = with_short[mark:]
            closing = self.special.search(following)
            if text.endswith(following) and closing is not None:
                return len(text) - len(following) + closing.end()
        raise RejectedConversation(f"the chat template gives no exact end of message {index + 1} (assistant)")

    def _without_trailing_text(self, text: str, start: int, end: int) -> int:
        """Return `end`, moved back to the end of the last special token if only white space follows: the model stops
        there."""
        last = last_match(self.special, text, start, end)
        return last.end() if last is not None and not text[last.end() : end].strip() else end

    def _ends_with_special(self, text: str) -> bool:
        return any(text.endswith(token) for token in self.special_tokens)

    def _omitted_end(self, message: Message) -> str:
        """Return the EOS token that the template omits after the last message; "" if it writes one."""
        return self.profile.call_end if message.get("tool_calls") else self.profile.appended_end

    def _lacks_end(self, text: str, end: int, message: Message) -> bool:
        """Whether the last message, which ends at `end`, has no EOS token although it needs one."""
        is_ended = any(text.endswith(token, 0, end) for token in self.profile.end_tokens)
        return bool(self._omitted_end(message)) and not is_ended


def _has_content(message: Message) -> bool:
    """Whether a message has text, reasoning or tool calls."""
    return bool(message["content"].strip() or message.get("reasoning_content") or message.get("tool_calls"))
