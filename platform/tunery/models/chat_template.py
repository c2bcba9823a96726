"""Render conversations with a model's chat template, and find the characters that the model generates.

A template is a program: it may strip content, drop the reasoning of earlier messages, raise on a system message, or add
no EOS token after the last message. The response is therefore never searched for in the rendered text. Its boundaries
come from the template, by one of three methods; a conversation for which none is exact is rejected with the reason:

    generation blocks  the spans that the template marks with `{% generation %}`
    sentinels          the conversation is rendered again with Unicode noncharacters at both ends of each message's
                       content. If removing them gives the first rendering, their positions are exact
    prefixes           the messages before a response with the generation prompt, and the messages up to its end, are
                       rendered too. If both are prefixes of the full text, their lengths are exact (tool calls)

The behaviour of a template is determined once, by rendering small conversations (`TemplateProfile`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tunery.models.template_input import inline_reasoning, template_input, unescape
from tunery.models.template_profile import alternating, profile_of
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
    turn: int
    """Index of the assistant message."""


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
    return _profiled(tokenizer, json.dumps(tokenizer.chat_template))


@lru_cache(maxsize=8)  # small, because it keeps the tokenizers alive
def _profiled(tokenizer: PreTrainedTokenizerBase, source: str) -> ChatTemplate:
    return ChatTemplate(tokenizer)


class ChatTemplate(TemplateRenderer):
    """A chat template with its profile."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UnsupportedTemplate."""
        super().__init__(tokenizer)
        self.profile = profile_of(self)
        # A response may contain markup such as <think> and <tool_call>, but no tokens that delimit messages.
        turns = [self.given(turn) for turn in alternating(4 if self.profile.multi_turn else 2)]
        basic = self.render(turns) + self.render(turns[:1], generation_prompt=True)
        endings = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
        delimiters = {*self.control.findall(basic), *endings, *self.profile.end_tokens, *self.profile.history_ends}
        self._delimiters = any_of(delimiters - {"<think>", "</think>"})
        self._ends = (*self.profile.end_tokens, *self.profile.history_ends)
        try:
            self._spans(alternating(2), None, mask_empty_thinking=True)
        except RejectedConversation as error:
            raise UnsupportedTemplate(str(error)) from error

    def conversation(self, row: Row, mask_empty_thinking: bool = True) -> RenderedConversation:
        """Render a row with `messages`. `mask_empty_thinking`: count an empty thinking block before a response as part
        of the prompt, although the model would generate it. Raises RejectedConversation."""
        prepared = template_input(row, self, self._delimiters)
        rendered = self._spans(prepared.messages, prepared.tools, mask_empty_thinking)
        return replace(rendered, escaped_tokens=prepared.escaped_tokens)

    def prompt(self, row: Row) -> RenderedConversation:
        """Render a prompt with the generation prompt: the same characters as `conversation` has before the response,
        with the spans of earlier responses. Raises RejectedConversation."""
        prepared = template_input(row, self, self._delimiters)
        messages, tools = prepared.messages, prepared.tools
        text, marks = self.marked(messages, tools, generation_prompt=True)
        self._check_complete(messages, marks)
        spans: tuple[ResponseSpan, ...] = ()
        if any(message["role"] == "assistant" for message in messages):
            rendered = self._spans(messages, tools, mask_empty_thinking=True)
            common = self.shared_prefix(text, rendered.text)
            spans = tuple(span for span in rendered.spans if span.end <= common)
        return RenderedConversation(text, spans, 0, prepared.escaped_tokens)

    def unescape(self, text: str) -> str:
        """Replace escaped special tokens by their text."""
        return unescape(text, self.control_tokens)

    def _spans(self, messages: list[Message], tools: Any, mask_empty_thinking: bool) -> RenderedConversation:
        text, marks = self.marked(messages, tools)
        self._check_complete(messages, marks)
        responses = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        spans: list[ResponseSpan] = []
        dropped = 0
        blocks = self._blocks(messages, tools, text, responses)
        for turn in responses:
            message, last = messages[turn], turn == len(messages) - 1
            if not _has_content(message):
                continue
            if self._drops_reasoning(message, turn, marks):
                dropped += 1
                thinks = self.profile.reasoning or self.profile.thinking_model
                if thinks and not last:
                    continue  # a thinking model would learn to respond without thinking
                if last and (built := self._with_reasoning(messages, tools, text, marks)) is not None:
                    return RenderedConversation(built[0], (*spans, built[1]), dropped - 1, 0)
            start, end = self._span(messages, tools, text, marks, turn, mask_empty_thinking, blocks.get(turn))
            if last and self._lacks_end(text, end, message):
                ending = self.profile.call_end if message.get("tool_calls") else self.profile.appended_end
                text = text[:end] + ending
                end = len(text)
            spans.append(ResponseSpan(start, end, turn))
        return RenderedConversation(text, tuple(spans), dropped, 0)

    def _span(
        self,
        messages: Sequence[Message],
        tools: Any,
        text: str,
        marks: Marks | None,
        turn: int,
        mask_empty_thinking: bool,
        block: tuple[int, int] | None,
    ) -> tuple[int, int]:
        """Return start and end of a response. `block`: the generation block; some include the generation prompt, which
        never has a loss."""
        try:
            start = self._start(messages, tools, text, marks, turn, mask_empty_thinking)
            end = block[1] if block else self._end(messages, tools, text, marks, turn)
        except RejectedConversation:
            if block is None:
                raise
            start, end = block
        for token in self.profile.history_ends:
            if text.endswith(token, start, end):
                end -= len(token)
        return max(start, block[0]) if block else start, end

    def _check_complete(self, messages: Sequence[Message], marks: Marks | None) -> None:
        """Raise RejectedConversation if the template omits the content of a message, or does not keep the order."""
        if marks is None:
            return
        for turn, message in enumerate(messages):
            text_start = marks.get(("content", turn), -1)
            if message.get("tool_calls") and any(
                0 <= marks.get(("content", result), -1) < text_start for result in range(turn + 1, len(messages))
            ):
                raise RejectedConversation(  # Gemma 4
                    f"the chat template renders the text of message {turn + 1} (assistant) after the results of its "
                    "tool calls"
                )
            if message["content"].strip() and ("content_end", turn) not in marks:
                beside = "beside the tool calls " if message.get("tool_calls") else ""
                raise RejectedConversation(
                    f"the chat template does not render the text {beside}of message {turn + 1} ({message['role']})"
                )
            for n in range(len(message.get("tool_calls", ()))):
                if (f"call{n}_", turn) not in marks:
                    raise RejectedConversation(
                        f"the chat template does not render tool call {n + 1} of message {turn + 1} (assistant)"
                    )

    def _blocks(
        self, messages: Sequence[Message], tools: Any, text: str, responses: Sequence[int]
    ) -> dict[int, tuple[int, int]]:
        """Return the `{% generation %}` block of each turn, including an EOS token right after the block."""
        if not self.profile.generation_blocks:
            return {}
        rendered, spans = self.rendered([self.given(message) for message in messages], tools, False, blocks=True)
        if rendered != text or len(spans) != len(responses):
            return {}
        found = {}
        for turn, (start, end) in zip(responses, spans, strict=True):
            if not any(text.endswith(token, start, end) for token in self._ends):
                closing = next((item for item in self.profile.closings if text.startswith(item, end)), "")
                end += len(closing)
            found[turn] = (start, self._without_trailing_text(text, start, end))
        return found

    def _drops_reasoning(self, message: Message, turn: int, marks: Marks | None) -> bool:
        if marks is None:
            return False
        if message.get("reasoning_content"):
            return ("reasoning", turn) not in marks
        # Inline reasoning in the content: a template that splits at </think> drops what precedes it.
        return bool(message["content"].strip()) and ("content", turn) not in marks

    def _with_reasoning(
        self, messages: Sequence[Message], tools: Any, text: str, marks: Marks | None
    ) -> tuple[str, ResponseSpan] | None:
        """Render the last response as a thinking model generates it, if the template drops all reasoning (DeepSeek-R1):
        the generation prompt, reasoning, `</think>`, response and its EOS token."""
        if not self.profile.thinking_model:
            return None
        turn, message = len(messages) - 1, messages[-1]
        reasoning, content = message.get("reasoning_content"), message["content"]
        if not reasoning:
            if (inline := inline_reasoning(content)) is None:
                return None
            reasoning, content = inline
        prompt = self.render(
            [self.given(item) for item in messages[:-1]], tools, True, enable_thinking=True, thinking=True
        )
        if prompt.rstrip().endswith("</think>"):
            return None  # the model generates only responses without thinking
        opening = "" if prompt.endswith("<think>\n") else "\n" if prompt.endswith("<think>") else "<think>\n"
        if marks is None or ("content_end", turn) not in marks or message.get("tool_calls"):
            return None
        closing = text[marks["content_end", turn] : self._end(messages, tools, text, marks, turn)]
        whole = f"{prompt}{opening}{reasoning}\n</think>\n\n{content.lstrip(chr(10)).rstrip()}{closing}"
        if self._lacks_end(whole, len(whole), message):
            whole += self.profile.appended_end
        return whole, ResponseSpan(len(prompt), len(whole), turn)

    def _start(
        self,
        messages: Sequence[Message],
        tools: Any,
        text: str,
        marks: Marks | None,
        turn: int,
        mask_empty_thinking: bool,
    ) -> int:
        """Return the end of the generation prompt, where the response starts."""
        message = messages[turn]
        first, own = -1, message["content"]
        if marks is not None and ("reasoning", turn) in marks:
            first, own = marks["reasoning", turn], message["reasoning_content"]
        elif marks is not None:
            first = marks.get(("content", turn), -1)
        if first >= 0:
            space = own[: len(own) - len(own.lstrip())]
            for at in (
                first - kept
                for kept in range(len(space), -1, -1)
                if text.endswith(space[len(space) - kept :], 0, first)
            ):
                for header in self.profile.headers:
                    if header.text and text.endswith(header.text, 0, at):
                        if header.empty_thinking and mask_empty_thinking:
                            return at
                        begin, prompt = at - len(header.text), self.profile.generation_prompt
                        # Content may itself begin with the rest of the generation prompt (`<think>`).
                        given = len(prompt) if text.startswith(prompt, begin) else header.generated_from
                        return begin + given
        prompt = self.render([self.given(item) for item in messages[:turn]], tools, generation_prompt=True)
        header_start = len(prompt) - len(self.profile.generation_prompt)
        if mask_empty_thinking and prompt.endswith(self.profile.generation_prompt):
            for header in self.profile.headers:
                if header.empty_thinking and text.startswith(prompt[:header_start] + header.text):
                    return header_start + len(header.text)
        if text.startswith(prompt):
            return len(prompt)
        before = self.before(messages[:turn], tools)
        if text.startswith(before):
            return len(before) + self.shared_prefix(prompt[len(before) :], text[len(before) :])
        raise RejectedConversation(f"the chat template gives no exact start of message {turn + 1} (assistant)")

    def _end(self, messages: Sequence[Message], tools: Any, text: str, marks: Marks | None, turn: int) -> int:
        """Return the end of the response, including its EOS token."""
        message, last = messages[turn], turn == len(messages) - 1
        at = -1 if marks is None or message.get("tool_calls") else marks.get(("content_end", turn), -1)
        if at >= 0:
            content = message["content"]
            space = content[len(content.rstrip()) :]
            for lead in (space[:kept] for kept in range(len(space), -1, -1)):
                for closing in self.profile.closings:
                    if text.startswith(lead + closing, at):
                        return at + len(lead) + len(closing)
                if last and self.profile.appended_end and text[at:] == lead + self.profile.unclosed:
                    return at + len(lead)
        if last:
            return self._without_trailing_text(text, at if at >= 0 else 0, len(text))
        upto = self.render([self.given(item) for item in messages[: turn + 1]], tools)
        if not text.startswith(upto):
            return self._end_before_rest(messages, tools, text, turn)
        end = self._without_trailing_text(text, at if at >= 0 else 0, len(upto))
        if not self._ends_with_special(text[:end]) and (following := self.special.match(text, end)):
            return following.end()  # the first token of the next message ends this one (GLM-4.5)
        if at >= 0 and self.special.search(text, at, end) is None:
            space = message["content"][len(message["content"].rstrip()) :]  # no EOS token follows
            return at + len(space) if text.startswith(space, at) else at
        return end

    def _end_before_rest(self, messages: Sequence[Message], tools: Any, text: str, turn: int) -> int:
        """Return the end of a response if the template renders a message differently when it is the last one (Qwen3's
        thinking block): the text after it is the same as after a plain response at its position."""
        plain = {"role": "assistant", "content": "w"}
        other, marks = self.marked([*messages[:turn], plain, *messages[turn + 1 :]], tools)
        if marks is not None and (at := marks.get(("content_end", turn), -1)) >= 0:
            rest = other[at:]
            closing = self.special.search(rest)
            if text.endswith(rest) and closing is not None:
                return len(text) - len(rest) + closing.end()
        raise RejectedConversation(f"the chat template gives no exact end of message {turn + 1} (assistant)")

    def _without_trailing_text(self, text: str, start: int, end: int) -> int:
        """Return `end`, moved back to the last special token if only white space follows: the model stops there."""
        last = last_match(self.special, text, start, end)
        return last.end() if last is not None and not text[last.end() : end].strip() else end

    def _ends_with_special(self, text: str) -> bool:
        return any(text.endswith(token) for token in self.special_tokens)

    def _lacks_end(self, text: str, end: int, message: Message) -> bool:
        ending = self.profile.call_end if message.get("tool_calls") else self.profile.appended_end
        return bool(ending) and not any(text.endswith(token, 0, end) for token in self.profile.end_tokens)


def _has_content(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("reasoning_content") or message.get("tool_calls"))
