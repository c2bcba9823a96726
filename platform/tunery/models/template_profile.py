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


def alternating(count: int) -> list[Message]:
    """Return `count` messages, alternating between user and assistant, with distinct content."""
    return [{"role": ("user", "assistant")[turn % 2], "content": f"w{turn}"} for turn in range(count)]


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
    question = alternating(1)
    text, marks = _basic(template)
    source = json.dumps(template.source, ensure_ascii=False)
    try:
        alone = template.render([template.given(item) for item in question])
        prompt = template.render([template.given(item) for item in question], generation_prompt=True)
    except RejectedConversation as error:
        raise UnsupportedTemplate(f"the chat template can't render a user message: {error}") from error
    profile = replace(
        template.profile,
        generation_prompt=prompt[template.shared_prefix(prompt, alone) :],
        generation_blocks=bool(re.search(r"\{%-?\s*generation\s*-?%\}", source)),
        thinking_model="</think>" in source,
        prefix=text.startswith(prompt),
    )
    template.profile = profile
    headers: list[ResponseHeader] = []
    closings: dict[str, None] = {}
    within: set[str] = set()
    final: set[str] = set()
    unclosed = None

    def collect_headers(messages: list[Message], tools: Any = None) -> tuple[str, Marks] | None:
        """Collect the headers and closings of a conversation's responses. Return None if it can't be rendered, or if
        marks change the rendering."""
        nonlocal unclosed
        try:
            text, marks = template.marked(messages, tools)
        except RejectedConversation:
            return None
        if marks is None:
            return None
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            first = min((marks[key] for key in (("reasoning", turn), ("content", turn)) if key in marks), default=-1)
            before = template.before(messages[:turn], tools)
            if first >= len(before) and text.startswith(before):
                header = text[len(before) : first]
                headers.append(ResponseHeader(header, _generated_from(template, header), False))
            behind = marks.get(("content_end", turn), -1)
            if behind < 0 or message.get("tool_calls"):
                continue
            if (thought := marks.get(("reasoning_end", turn), -1)) >= 0 and ("content", turn) in marks:
                within.update(template.special.findall(text[thought : marks["content", turn]]))
            following = text[behind : marks.get(("content", turn + 1), len(text))]
            if closing := _closing(template, following):
                closings[closing] = None
                if turn == len(messages) - 1:
                    final.add(template.special.findall(closing)[-1])
            elif turn == len(messages) - 1:
                unclosed = following
        return text, marks

    collect_headers(alternating(2))
    multi_turn = collect_headers(alternating(4)) is not None
    thought = [{**turn, "reasoning_content": f"r{n}"} if n % 2 else turn for n, turn in enumerate(alternating(4))]
    found = collect_headers(thought)
    reasoning = found is not None and ("reasoning", 3) in found[1]
    empty = set()
    if found is not None and reasoning:
        text, marks = found
        header = headers[-1].text if headers else ""
        empty.add(_unopened(header + text[marks["reasoning_end", 3] : marks["content", 3]]))
    system = collect_headers([{"role": "system", "content": "s"}, *alternating(2)])
    renders_system = system is not None and ("content", 0) in system[1]
    profile = replace(
        profile,
        headers=_distinct(headers, empty),
        closings=tuple(sorted(closings, key=len, reverse=True)),
        unclosed=unclosed or "",
        multi_turn=multi_turn,
        reasoning=reasoning,
        earlier_reasoning=found is not None and ("reasoning", 1) in found[1],
        system=renders_system,
    )
    template.profile = profile
    profile = _with_tools(template, profile)
    profile = template.profile = replace(profile, tools=_renders_tools(template))
    if profile.tool_calls:
        called = [*alternating(1), {"role": "assistant", "content": "", "tool_calls": [template.call(_CALL)]}]
        if profile.tool_results:
            called += [{"role": "tool", "content": "t2"}, {"role": "assistant", "content": "w3"}]
        if profile.call_ids:
            number_calls(called)
        collect_headers(called)
        profile = replace(
            profile,
            headers=_distinct(headers, empty),
            closings=tuple(sorted(closings, key=len, reverse=True)),
        )
    profile = _with_end(template, profile, unclosed)
    within -= {*final, profile.appended_end, profile.call_end}
    history = tuple(token for token in profile.end_tokens if token in within)
    ends = tuple(token for token in profile.end_tokens if token not in within)
    return replace(profile, end_tokens=ends, history_ends=history)


def _closing(template: TemplateRenderer, following: str) -> str:
    """Return the text up to the first special token, or up to the tokenizer's EOS token if only special tokens come
    before it (Cohere's `<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`). Empty if there is no special token."""
    first = template.special.search(following)
    if first is None:
        return ""
    end = first.end()
    while (token := template.special.match(following, end)) is not None and first[0] != template.tokenizer.eos_token:
        end = token.end()
        if token[0] == template.tokenizer.eos_token:
            return following[:end]
    return following[: first.end()]


def _basic(template: TemplateRenderer) -> tuple[str, Marks]:
    """Render a user message with a response. Content is passed as text or, if that fails, as a list of parts; sets
    `template.profile` accordingly. Raises UnsupportedTemplate if the template renders neither form."""
    failure = ""
    for parts in (False, True):
        template.profile = TemplateProfile(content_parts=parts)
        try:
            text, marks = template.marked(alternating(2), None)
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
    return len(header) if shared < len(prompt) and _squeezed(header) == _squeezed(prompt) else shared


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _unopened(text: str) -> str:
    return _squeezed(text).replace("<think>", "")


def _distinct(headers: Sequence[ResponseHeader], empty: set[str]) -> tuple[ResponseHeader, ...]:
    """Remove duplicate headers and sort them by length, descending.

    `empty`: headers with the markup around reasoning, but without the reasoning itself. A header that equals one of
    them, ignoring white space and `<think>`, contains an empty thinking block.
    """
    found = {}
    for header in headers:
        # GLM-4.7 writes only `</think>`, where a generation prompt may have opened the block.
        empty_thinking = "think" in header.text and _unopened(header.text) in empty
        found[header.text] = replace(header, empty_thinking=empty_thinking)
    return tuple(sorted(found.values(), key=lambda header: -len(header.text)))


def _with_tools(template: TemplateRenderer, profile: TemplateProfile) -> TemplateProfile:
    """Return the profile with the form in which the template expects tool calls, if it supports them.

    The forms are tried in turn: arguments as an object or as text, content empty or null, calls without ids or with
    them.
    """
    question, result = alternating(1)[0], {"role": "tool", "content": "t_result", "name": "n_call"}
    for ids in (False, True):
        for content in ("", None):
            for as_text in (False, True):
                tried = replace(profile, tool_calls=True, arguments_as_text=as_text, call_content=content, call_ids=ids)
                template.profile = tried
                messages = [
                    question,
                    {"role": "assistant", "content": "", "tool_calls": [template.call(_CALL)]},
                    dict(result),
                ]
                if ids:
                    number_calls(messages)
                try:
                    given = [template.given(message) for message in messages]
                    called = template.render(given[:2])
                except RejectedConversation:
                    continue
                if not _has_call(called, as_text) or not _ends_alike(template, given[0], given[1], called):
                    continue
                try:
                    whole = template.render(given)
                    tried = replace(tried, tool_results="t_result" in whole)
                except RejectedConversation:
                    whole = called
                tail = called[len(template.render(given[:1])) :]
                last = last_match(template.special, tail, 0, len(tail))
                if last is not None and not tail[last.end() :].strip():
                    return replace(tried, end_tokens=(last[0],))
                following = template.special.match(whole, len(called)) if whole.startswith(called) else None
                return replace(tried, call_end=following[0] if following else "?")
    return replace(profile, tool_calls=False)


def _renders_tools(template: TemplateRenderer) -> bool:
    """Whether the template renders tool definitions."""
    try:
        defined = template.render([template.given(item) for item in alternating(1)], [_TOOL])
    except RejectedConversation:
        return False
    return "n_tool" in defined and "k_arg" in defined


def _has_call(text: str, as_text: bool) -> bool:
    """Whether `text` contains the complete call, with arguments formatted neither as a Python dict nor, if they were
    passed as text, as a string within JSON."""
    if not all(part in text for part in ("n_call", "k_arg", "v_arg")):
        return False
    return "'k_arg'" not in text and (not as_text or '\\"k_arg' not in text)


def _ends_alike(template: TemplateRenderer, question: Message, calling: Message, called: str) -> bool:
    """Whether a message with one call ends with the same special token as a message with two. DeepSeek-R1's template
    ends the message only within the loop, at the second call."""
    twice = {**calling, "tool_calls": [*calling["tool_calls"], *json.loads(json.dumps(calling["tool_calls"]))]}
    try:
        text = template.render([question, twice])
    except RejectedConversation:  # Llama 3.1 supports only one call per message
        return True
    return bool(template.special.findall(text)[-1:] == template.special.findall(called)[-1:])


def _with_end(template: TemplateRenderer, profile: TemplateProfile, unclosed: str | None) -> TemplateProfile:
    """Return the profile with the tokens that end a response, and the EOS token to append if the template omits it
    after the last message. Raises UnsupportedTemplate if no EOS token is known."""
    eos = template.tokenizer.eos_token
    ends = []
    for closing in profile.closings:
        token = template.special.findall(closing)[-1]
        if token not in ends:
            ends.append(token)
    appended = ""
    if unclosed is not None:
        # The token that ends earlier responses (it may be the first token of the next message), or the tokenizer's own.
        appended = ends[0] if ends else eos or ""
        if not appended:
            raise UnsupportedTemplate(
                "it renders no end token after a response, and the tokenizer has no `eos_token`: the model would never "
                "learn to stop"
            )
    if appended and appended not in ends:
        ends.append(appended)
    if profile.call_end == "?":
        profile = replace(profile, call_end=appended or eos or "")
    called = (profile.call_end, *profile.end_tokens)
    ends += [token for token in called if token and token not in ends]
    return replace(profile, end_tokens=tuple(ends), appended_end=appended)
