"""Determine the behaviour of a chat template by rendering small conversations.

A profile records the form in which the template expects content and tool calls, the text that it writes before and
after a response, and the kinds of messages that it drops or fails on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tunery.models.template_rendering import (
    Marks,
    Message,
    RejectedConversation,
    ResponseHeader,
    TemplateProfile,
    TemplateRenderer,
    UnsupportedTemplate,
    last_match,
    number_calls,
)


def alternating_messages(count: int) -> list[Message]:
    """Return `count` messages, alternating between user and assistant, with distinct content."""
    return [{"role": ("user", "assistant")[index % 2], "content": f"w{index}"} for index in range(count)]


_UNKNOWN_END = "?"
"""`call_end` until the EOS token of other responses is known."""
_CALL = {"type": "function", "function": {"name": "n_call", "arguments": {"k_arg": "v_arg"}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "n_tool",
        "description": "d_tool",
        "parameters": {"type": "object", "properties": {"k_arg": {"type": "string", "description": "d_arg"}}},
    },
}


def profile_of(template: TemplateRenderer) -> TemplateProfile:
    """Return the profile of a chat template. Raises UnsupportedTemplate if the template can't render a user message
    with a response, or if it writes no EOS token and the tokenizer has none."""
    template.profile = TemplateProfile()
    text, _ = _render_simple(template)
    source = json.dumps(template.source, ensure_ascii=False)
    user_message = [template.as_template_message(message) for message in alternating_messages(1)]
    try:
        history = template.render(user_message)
        prompt = template.render(user_message, generation_prompt=True)
    except RejectedConversation as error:
        raise UnsupportedTemplate(f"the chat template can't render a user message: {error}") from error
    profile = replace(
        template.profile,
        generation_prompt=prompt[template.shared_prefix(prompt, history) :],
        generation_blocks=bool(re.search(r"\{%-?\s*generation\s*-?%\}", source)),
        thinking_model="</think>" in source,
        prefix=text.startswith(prompt),
    )
    template.profile = profile
    headers: list[ResponseHeader] = []
    closings: dict[str, None] = {}  # a set in the order of insertion
    within_response: set[str] = set()  # special tokens between reasoning and content
    last_ends: set[str] = set()  # EOS tokens of last messages
    unclosed = None  # text after a last message without EOS token

    def collect(messages: list[Message], tools: Any = None) -> tuple[str, Marks] | None:
        """Collect headers and closings of the responses in a conversation. Return its text and marks, or None if it
        can't be rendered or if marks change the rendering."""
        nonlocal unclosed
        try:
            text, marks = template.render_marked(messages, tools)
        except RejectedConversation:
            return None
        if marks is None:
            return None
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            is_last = index == len(messages) - 1
            starts = [marks[key] for key in (("reasoning", index), ("content", index)) if key in marks]
            start = min(starts, default=-1)
            history = template.render_history(messages[:index], tools)
            if start >= len(history) and text.startswith(history):
                header = text[len(history) : start]
                headers.append(ResponseHeader(header, _generated_from(template, header), False))
            content_end = marks.get(("content_end", index), -1)
            if content_end < 0 or message.get("tool_calls"):
                continue
            reasoning_end = marks.get(("reasoning_end", index), -1)
            if reasoning_end >= 0 and ("content", index) in marks:
                within_response.update(template.special.findall(text[reasoning_end : marks["content", index]]))
            following = text[content_end : marks.get(("content", index + 1), len(text))]
            if closing := _closing(template, following):
                closings[closing] = None
                if is_last:
                    last_ends.add(template.special.findall(closing)[-1])
            elif is_last:
                unclosed = following
        return text, marks

    collect(alternating_messages(2))
    multi_turn = collect(alternating_messages(4)) is not None
    with_reasoning = [
        {**message, "reasoning_content": f"r{index}"} if message["role"] == "assistant" else message
        for index, message in enumerate(alternating_messages(4))
    ]
    rendered = collect(with_reasoning)
    reasoning = rendered is not None and ("reasoning", 3) in rendered[1]
    empty_thinking_headers = set()
    if rendered is not None and reasoning:
        text, marks = rendered
        header = headers[-1].text if headers else ""
        empty_thinking_headers.add(_without_think_tag(header + text[marks["reasoning_end", 3] : marks["content", 3]]))
    with_system = collect([{"role": "system", "content": "s"}, *alternating_messages(2)])
    renders_system = with_system is not None and ("content", 0) in with_system[1]
    profile = replace(
        profile,
        headers=_distinct(headers, empty_thinking_headers),
        closings=tuple(sorted(closings, key=len, reverse=True)),
        unclosed=unclosed or "",
        multi_turn=multi_turn,
        reasoning=reasoning,
        earlier_reasoning=rendered is not None and ("reasoning", 1) in rendered[1],
        system=renders_system,
    )
    template.profile = profile
    profile = _with_tools(template, profile)
    profile = template.profile = replace(profile, tools=_renders_tools(template))
    if profile.tool_calls:
        calling_message = {"role": "assistant", "content": "", "tool_calls": [template.format_call(_CALL)]}
        with_call = [*alternating_messages(1), calling_message]
        if profile.tool_results:
            with_call += [{"role": "tool", "content": "t2"}, {"role": "assistant", "content": "w3"}]
        if profile.call_ids:
            number_calls(with_call)
        collect(with_call)
        profile = replace(
            profile,
            headers=_distinct(headers, empty_thinking_headers),
            closings=tuple(sorted(closings, key=len, reverse=True)),
        )
    profile = _with_end(template, profile, unclosed)
    within_response -= {*last_ends, profile.appended_end, profile.call_end}
    history_ends = tuple(token for token in profile.end_tokens if token in within_response)
    end_tokens = tuple(token for token in profile.end_tokens if token not in within_response)
    return replace(profile, end_tokens=end_tokens, history_ends=history_ends)


def _closing(template: TemplateRenderer, following: str) -> str:
    """Return `following`, the text after a response, up to and including the first special token, or the tokenizer's
    EOS token if only special tokens come before it (Cohere's `<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`). "" if there is
    no special token."""
    first = template.special.search(following)
    if first is None:
        return ""
    end = first.end()
    while (token := template.special.match(following, end)) is not None and first[0] != template.tokenizer.eos_token:
        end = token.end()
        if token[0] == template.tokenizer.eos_token:
            return following[:end]
    return following[: first.end()]


def _render_simple(template: TemplateRenderer) -> tuple[str, Marks]:
    """Render a user message with a response. Content is passed as text or, if that fails, as a list of parts;
    `template.profile` is set accordingly. Raises UnsupportedTemplate if the template renders neither form."""
    failure = ""
    for parts in (False, True):
        template.profile = TemplateProfile(content_parts=parts)
        try:
            text, marks = template.render_marked(alternating_messages(2), None)
        except RejectedConversation as error:
            failure = failure or str(error)
            continue
        if marks is not None and ("content", 0) in marks and ("content", 1) in marks:
            return text, marks
    raise UnsupportedTemplate(failure or "it does not render the content of a prompt with a response")


def _generated_from(template: TemplateRenderer, header: str) -> int:
    """Return the index at which a header diverges from the generation prompt; its length if they differ only in white
    space."""
    prompt = template.profile.generation_prompt
    shared = template.shared_prefix(prompt, header)
    return len(header) if shared < len(prompt) and _without_space(header) == _without_space(prompt) else shared


def _without_space(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _without_think_tag(text: str) -> str:
    """Return the text without white space and `<think>`."""
    return _without_space(text).replace("<think>", "")


def _distinct(headers: Sequence[ResponseHeader], empty_thinking_headers: set[str]) -> tuple[ResponseHeader, ...]:
    """Remove duplicate headers and sort them by length, descending.

    empty_thinking_headers: texts of headers with the markup around reasoning, but without reasoning, by
    `_without_think_tag`. A header that equals one of them contains an empty thinking block.
    """
    by_text = {}
    for header in headers:
        # GLM-4.7 writes only `</think>`, where a generation prompt may have opened the block.
        empty_thinking = "think" in header.text and _without_think_tag(header.text) in empty_thinking_headers
        by_text[header.text] = replace(header, empty_thinking=empty_thinking)
    return tuple(sorted(by_text.values(), key=lambda header: -len(header.text)))


def _with_tools(template: TemplateRenderer, profile: TemplateProfile) -> TemplateProfile:
    """Return the profile with the form in which the template expects tool calls, if it supports them.

    The forms are tried one after another: calls without ids or with them, content empty or null, arguments as an object
    or as text.
    """
    user_message, result = alternating_messages(1)[0], {"role": "tool", "content": "t_result", "name": "n_call"}
    for ids in (False, True):
        for content in ("", None):
            for as_text in (False, True):
                tried = replace(profile, tool_calls=True, arguments_as_text=as_text, call_content=content, call_ids=ids)
                template.profile = tried
                messages = [
                    user_message,
                    {"role": "assistant", "content": "", "tool_calls": [template.format_call(_CALL)]},
                    dict(result),
                ]
                if ids:
                    number_calls(messages)
                try:
                    template_messages = [template.as_template_message(message) for message in messages]
                    with_call = template.render(template_messages[:2])
                except RejectedConversation:
                    continue
                if not _has_call(with_call, as_text):
                    continue
                if not _two_calls_end_alike(template, template_messages[0], template_messages[1], with_call):
                    continue
                try:
                    with_result = template.render(template_messages)
                    tried = replace(tried, tool_results="t_result" in with_result)
                except RejectedConversation:
                    with_result = with_call
                call_text = with_call[len(template.render(template_messages[:1])) :]
                last = last_match(template.special, call_text, 0, len(call_text))
                if last is not None and not call_text[last.end() :].strip():
                    return replace(tried, end_tokens=(last[0],))
                has_prefix = with_result.startswith(with_call)
                following = template.special.match(with_result, len(with_call)) if has_prefix else None
                return replace(tried, call_end=following[0] if following else _UNKNOWN_END)
    return replace(profile, tool_calls=False)


def _renders_tools(template: TemplateRenderer) -> bool:
    """Whether the template renders tool definitions."""
    try:
        text = template.render([template.as_template_message(item) for item in alternating_messages(1)], [_TOOL])
    except RejectedConversation:
        return False
    return "n_tool" in text and "k_arg" in text


def _has_call(text: str, as_text: bool) -> bool:
    """Whether `text` contains the complete call, with arguments formatted neither as a Python dict nor, if they were
    passed as text, as a string within JSON."""
    if not all(part in text for part in ("n_call", "k_arg", "v_arg")):
        return False
    return "'k_arg'" not in text and (not as_text or '\\"k_arg' not in text)


def _two_calls_end_alike(
    template: TemplateRenderer, user_message: Message, calling_message: Message, with_call: str
) -> bool:
    """Whether a message with two calls ends with the same special token as one with one call, whose text is
    `with_call`. DeepSeek-R1's template ends a message within the loop over calls, at the second one."""
    calls = calling_message["tool_calls"]
    twice = {**calling_message, "tool_calls": [*calls, *json.loads(json.dumps(calls))]}
    try:
        text = template.render([user_message, twice])
    except RejectedConversation:  # Llama 3.1 supports only one call per message
        return True
    return bool(template.special.findall(text)[-1:] == template.special.findall(with_call)[-1:])


def _with_end(template: TemplateRenderer, profile: TemplateProfile, unclosed: str | None) -> TemplateProfile:
    """Return the profile with the tokens that end a response, and the EOS token to append if the template omits it
    after the last message. Raises UnsupportedTemplate if no EOS token is known."""
    eos_token = template.tokenizer.eos_token
    end_tokens = []
    for closing in profile.closings:
        token = template.special.findall(closing)[-1]
        if token not in end_tokens:
            end_tokens.append(token)
    appended_end = ""
    if unclosed is not None:
        # The token that ends earlier responses (it may be the first token of the next message), or the tokenizer's own.
        appended_end = end_tokens[0] if end_tokens else eos_token or ""
        if not appended_end:
            raise UnsupportedTemplate(
                "it renders no end token after a response, and the tokenizer has no `eos_token`: the model would never "
                "learn to stop"
            )
    if appended_end and appended_end not in end_tokens:
        end_tokens.append(appended_end)
    if profile.call_end == _UNKNOWN_END:
        profile = replace(profile, call_end=appended_end or eos_token or "")
    call_ends = (profile.call_end, *profile.end_tokens)
    end_tokens += [token for token in call_ends if token and token not in end_tokens]
    return replace(profile, end_tokens=tuple(end_tokens), appended_end=appended_end)
