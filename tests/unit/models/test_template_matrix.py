"""Every chat template with every kind of conversation: an exact mask, or a rejection with its reason.

The trained text is compared with handwritten rules, derived from the documentation of the model families: the text that
a model of the family generates for a message. The rules are independent of how the encoding locates a response.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from conversation_kinds import HOSTILE, KINDS, WITH_TOOLS, Message, encoded_kinds, row_of
from template_tokenizers import FAMILIES, rendered, source_of, tokenizer_of

from tunery.models.chat_template import chat_template_of
from tunery.models.encode import Encoded, Encoding, as_prompt, encode_prompts, encode_untruncated


@dataclass(frozen=True)
class Rule:
    """The text that a model family generates for an assistant message."""

    end: str = "<|im_end|>"
    middle_end: str | None = None
    """End token trained after a response that is not the last. None: `end`."""
    response_prefix: str = ""
    """Text before a response that has no reasoning."""
    content: Callable[[str], str] = str
    """Transformation that the template applies to the content of the last message."""
    earlier_content: Callable[[str], str] | None = None
    """The transformation for earlier messages. None: `content`."""
    reasoning: str | None = None
    """Format of reasoning `R`. None: the template does not render it, and the response is trained without it."""
    call_reasoning: str | None = None
    """Format of reasoning before a tool call. None: `reasoning`."""
    keeps_reasoning: bool = False
    """The template renders the reasoning of earlier messages. Otherwise it drops it and they are masked."""
    call: str | None = None
    """Format of a tool call with the argument `V`. None: tool calls are rejected."""
    before_calls: str = ""
    after_calls: str = ""
    between_calls: str | None = ""
    """Separator of parallel calls. None: they are rejected."""
    text_with_call: str | None = "TC"
    """Format of text `T` with a call `C`. None: the combination is rejected."""
    call_end: str | None = None
    """End token after a tool call. None: `end`."""
    definitions: bool = True
    """The template renders tool definitions."""
    system: str = ""
    """Part of the reason why a system message is rejected. Empty: it is rendered."""
    opens_thinking: bool = False
    """The generation prompt opens or closes a thinking block that the rendered row does not have."""
    reopens_turn: bool = False
    """After a tool result the conversation has a header that the generation prompt does not have."""
    empty_thinking: str = ""
    """Empty thinking block that is masked between the generation prompt and a response without reasoning."""


def strip_line_ends(text: str) -> str:
    return text.lstrip("\n")


JSON_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": V, "b": "two"}}\n</tool_call>'
XML_CALL = (
    "<tool_call>\n<function=add>\n<parameter=a>\nV\n</parameter>\n<parameter=b>\ntwo\n</parameter>\n</function>\n"
    "</tool_call>"
)
EMPTY_BLOCK = "<think>\n\n</think>\n\n"
QWEN25 = Rule(call=JSON_CALL, between_calls="\n", text_with_call="T\nC")
QWEN3 = replace(
    QWEN25,
    reasoning="<think>\nR\n</think>\n\n",
    content=strip_line_ends,
    earlier_content=str,
    empty_thinking=EMPTY_BLOCK,
)
QWEN35 = Rule(
    call=XML_CALL,
    between_calls="\n",
    text_with_call="T\n\nC",
    reasoning="R\n</think>\n\n",
    content=str.strip,
    empty_thinking="\n</think>\n\n",
)
NEMOTRON = Rule(
    call=XML_CALL,
    between_calls="\n",
    text_with_call="T\nC",
    after_calls="\n",
    reasoning="R\n</think>\n",
    call_reasoning="R\n</think>\n",
    content=str.rstrip,
    opens_thinking=True,
)
NEMOTRON_ULTRA = replace(NEMOTRON, reasoning="R</think>", call_reasoning="R</think>\n", before_calls="\n")
COHERE = Rule(end="<|END_OF_TURN_TOKEN|>", content=str.strip, definitions=False)
DEEPSEEK = Rule(
    end="<｜end▁of▁sentence｜>",
    reasoning="R\n</think>\n\n",
    opens_thinking=True,
    definitions=False,
    text_with_call="TC",
)
DEEPSEEK_CALL = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": V, "b": "two"}\n```<｜tool▁call▁end｜>'
GEMMA = Rule(end="<end_of_turn>", content=str.strip, definitions=False)
GEMMA4_CALL = '<|tool_call>call:add{a:V,b:<|"|>two<|"|>}<tool_call|>'
GEMMA4 = Rule(
    end="<turn|>",
    content=str.strip,
    call=GEMMA4_CALL,
    text_with_call="CT",
    call_end="<|tool_response>",
    call_reasoning="<|channel>thought\nR\n<channel|>",
)
LFM = Rule(
    call="add(a=V, b='two')", before_calls="<|tool_call_start|>[", after_calls="]<|tool_call_end|>", between_calls=", "
)
LLAMA3 = Rule(end="<|eot_id|>", content=str.strip, definitions=False)
LLAMA31 = replace(
    LLAMA3,
    call='{"name": "add", "parameters": {"a": V, "b": "two"}}',
    between_calls=None,
    text_with_call=None,
    definitions=True,
)
GLM = Rule(
    end="<|user|>",
    content=str.strip,
    reasoning="\n<think>R</think>\n",
    call="<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>V</arg_value>\n<arg_key>b</arg_key>\n"
    "<arg_value>two</arg_value>\n</tool_call>",
    between_calls="\n",
    text_with_call="T\nC",
    call_end="<|observation|>",
    empty_thinking="\n<think></think>\n",
)
GPT_OSS = Rule(
    end="<|return|>",
    middle_end="",  # history has <|end|> there, by which no model ends a response
    response_prefix="<|channel|>final<|message|>",
    reasoning="<|channel|>analysis<|message|>R<|end|><|start|>assistant<|channel|>final<|message|>",
    call_reasoning="<|channel|>analysis<|message|>R<|end|><|start|>assistant",
    call=' to=functions.add<|channel|>commentary json<|message|>{"a": V, "b": "two"}',
    between_calls=None,
    text_with_call="<|channel|>analysis<|message|>T<|end|><|start|>assistantC",
    call_end="<|call|>",
)
MUSE = Rule(
    end="<|eot|>",
    response_prefix=" to=user<|message|>",
    reasoning=" to=self<|message|>R<|eom|><|start|>assistant to=user<|message|>",
    call_reasoning=" to=self<|message|>R<|eom|><|start|>assistant",
    keeps_reasoning=True,
    call=' to=add<|message|><atem:function_calls>\n<atem:invoke name="add">\n<atem:parameter name="a">'
    'V</atem:parameter>\n<atem:parameter name="b">two</atem:parameter>\n</atem:invoke>\n</atem:function_calls>',
    between_calls="<|eom|><|start|>assistant",
    text_with_call=None,
)
PLAIN = Rule(end="<|end|>", definitions=False)
SCRATCH = replace(
    PLAIN,
    reasoning="<think>\nR\n</think>\n\n",
    keeps_reasoning=True,
    call='<tool_call>{"name": "add", "arguments": {"a": V, "b": "two"}}</tool_call>',
    definitions=True,
)
VISION = Rule(end="<end_of_utterance>", response_prefix=" ", definitions=False)

RULES: dict[str, Rule] = {
    "cohere": COHERE,
    "cohere2": replace(COHERE, end="<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", content=str),
    "deepseek_r1_distill": DEEPSEEK,
    "deepseekv3": replace(
        DEEPSEEK,
        call=DEEPSEEK_CALL,
        before_calls="<｜tool▁calls▁begin｜>",
        between_calls="\n",
        after_calls="<｜tool▁calls▁end｜>",
        call_reasoning="",  # not rendered beside calls
    ),
    "diffusion_gemma": replace(GEMMA4, reasoning="<|channel>thought\nR\n<channel|>", reopens_turn=True),
    "gemma": replace(GEMMA, system="System role not supported"),
    "gemma3": GEMMA,
    "gemma4": GEMMA4,
    "gemma4_v2": replace(GEMMA4, call_end="<turn|>", call_reasoning=""),
    "gemma4_v3": GEMMA4,
    "gemma4_v4": GEMMA4,
    "gemma4_v5": replace(GEMMA4, reasoning="<|channel>thought\nR\n<channel|>"),
    "glm4moe": GLM,
    "gptoss": GPT_OSS,
    "idefics3": VISION,
    "smolvlm": VISION,
    "lfm2": replace(LFM, call=None),
    "lfm2_v2": LFM,
    "lfm2_2_5": replace(LFM, reasoning="<think>R</think>"),
    "lfm2_2_5_v2": replace(LFM, reasoning="<think>R</think>"),
    "lfm2_2_5_vl": replace(LFM, reasoning="<think>R</think>"),
    "llama3": LLAMA3,
    "llama3_1": LLAMA31,
    "llama3_2": LLAMA31,
    "llava_next": replace(VISION, end="</s>"),
    "muse_glimmer": MUSE,
    "nemotron_3_nano": NEMOTRON,
    "nemotron_3_super": NEMOTRON,
    "nemotron_3_ultra": NEMOTRON_ULTRA,
    "nemotron_3_5_lightning": NEMOTRON_ULTRA,
    "phi3": PLAIN,
    "phi3_5": PLAIN,
    "qwen2_5": QWEN25,
    "qwen2_5_vl": replace(QWEN25, call=None, definitions=False),
    "qwen3": QWEN3,
    "qwen3_instruct_2507": QWEN25,
    "qwen3_vl": QWEN25,
    "qwen3_5_think": QWEN35,
    "qwen3_5_nothink": replace(QWEN35, opens_thinking=True),
    "qwen3_6": QWEN35,
    "qwen3_8": replace(QWEN35, keeps_reasoning=True),
    # Training variants that render other conversations than the original
    "qwen3_training": replace(QWEN3, keeps_reasoning=True, earlier_content=strip_line_ends),
    "qwen3_5_think_training": replace(QWEN35, keeps_reasoning=True),
    "qwen3_5_nothink_training": replace(QWEN35, keeps_reasoning=True, opens_thinking=True),
    "qwen3_6_training": replace(QWEN35, keeps_reasoning=True),
    "qwen3_8_training": replace(QWEN35, keeps_reasoning=True),
    # Written for these tests
    "chatml": Rule(definitions=False),
    "zephyr": replace(PLAIN, end="</s>"),
    "llama2": Rule(end=" </s>", response_prefix=" ", content=str.strip, definitions=False),
    "vicuna": replace(VISION, end="</s>"),
    "mistral_v3": Rule(
        end="</s>",
        response_prefix=" ",
        call='{"name": "add", "arguments": {"a": V, "b": "two"}, "id": "call0000#"}',
        before_calls="[TOOL_CALLS] [",
        between_calls=", ",
        after_calls="]",
        text_with_call=None,
        system="system turns are not supported",
    ),
    "glm_plain": Rule(end="<|user|>", response_prefix="\n", definitions=False),
    "no_end_tokens": replace(VISION, end="</s>", middle_end=""),
    "raises_on_system": replace(PLAIN, system="no system turns, please"),
    "ignores_system": replace(PLAIN, system="does not render the text of message 1 (system)"),
    "strips_content": replace(PLAIN, content=str.strip),
    "drops_thinking": replace(PLAIN, reasoning="<think>R</think>"),
    "dated": PLAIN,
    "scratch": SCRATCH,
    "plain": replace(SCRATCH, end="</s>"),
}


def rule_of(family: str) -> Rule:
    return RULES[family] if family in RULES else RULES[family.removesuffix("_training")]


def expected_texts(rule: Rule, messages: Sequence[Message]) -> list[str]:
    """Return the texts that the rule expects to be trained."""
    texts = []
    for index, message in enumerate(messages):
        last = index == len(messages) - 1
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        content, reasoning = message["content"], message.get("reasoning_content", "")
        if rule.reasoning is not None and content.startswith("<think>"):
            reasoning, content = "add", "four"
        if not content and not reasoning and not message.get("tool_calls"):
            continue
        reasoning_format = rule.reasoning
        if message.get("tool_calls") and rule.call_reasoning is not None:
            reasoning_format = rule.call_reasoning
        if reasoning and not last and reasoning_format is not None and not rule.keeps_reasoning:
            continue
        generated = (reasoning_format or "").replace("R", reasoning) if reasoning else ""
        content = (rule.content if last else rule.earlier_content or rule.content)(content)
        if message.get("tool_calls"):
            assert rule.call is not None
            arguments = [call["function"]["arguments"] for call in json.loads(message["tool_calls"])]
            values = [str((json.loads(item) if isinstance(item, str) else item)["a"]) for item in arguments]
            formatted_calls = [rule.call.replace("V", value).replace("#", str(n + 1)) for n, value in enumerate(values)]
            calls_text = rule.before_calls + (rule.between_calls or "").join(formatted_calls) + rule.after_calls
            if reasoning and rule.call_reasoning is not None and rule.before_calls == "\n":
                calls_text = calls_text.removeprefix("\n")  # the line end belongs to the block of reasoning
            if content:
                calls_text = (
                    (rule.text_with_call or "").replace("C", "\0").replace("T", content).replace("\0", calls_text)
                )
                calls_text = (
                    calls_text.replace("\n\n<tool_call>", "\n<tool_call>")
                    if rule.text_with_call == "T\nC"
                    else calls_text
                )
            generated += calls_text + (rule.end if rule.call_end is None else rule.call_end)
        else:
            generated += content if generated else rule.response_prefix + content
            generated += rule.end if last or rule.middle_end is None else rule.middle_end
        texts.append(generated)
    return texts


def reason_for_rejection(family: str, rule: Rule, kind: str, tools: bool) -> str:
    messages = KINDS[kind]
    tool_call_messages = [message for message in messages if message.get("tool_calls")]
    if tool_call_messages and rule.call is None:
        return "the chat template does not render tool calls"
    if tools and not rule.definitions:
        return "the chat template does not render the definitions of tools"
    if tool_call_messages and rule.text_with_call is None and tool_call_messages[0]["content"]:
        return "does not render the text beside the tool calls of message 2 (assistant)"
    if kind == "parallel tool calls" and rule.between_calls is None:
        return (
            "single tool-calls"
            if family.startswith("llama")
            else "does not render tool call 2 of message 2 (assistant)"
        )
    if kind == "system turn" and rule.system:
        return rule.system
    if kind in ("two user turns", "assistant first") and "alternate" in source_of(family):
        return "alternate"
    return ""


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_tokens_are_those_that_the_model_generates(family: str) -> None:
    rule, tokenizer = rule_of(family), tokenizer_of(family)
    wrong = []
    for kind, item in encoded_kinds(family).items():
        if reason := reason_for_rejection(family, rule, kind, kind in WITH_TOOLS):
            if reason not in item.rejected:
                wrong.append(f"{kind}: not rejected by {reason!r} but {item.rejected!r}")
            continue
        texts = [tokenizer.decode(item.ids[start:end]) for start, end in item.spans]
        if item.rejected or texts != expected_texts(rule, KINDS[kind]):
            wrong.append(f"{kind}: {item.rejected or texts} instead of {expected_texts(rule, KINDS[kind])}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_begins_with_the_tokens_that_are_masked_in_training(family: str) -> None:
    """Except for families whose generation prompt opens a thinking block that the row does not have."""
    rule, tokenizer = rule_of(family), tokenizer_of(family)
    items_with_response = {
        kind: item
        for kind, item in encoded_kinds(family).items()
        if item.spans and KINDS[kind][-1]["role"] == "assistant" and KINDS[kind][-1]["content"]
    }
    prompts = encode_prompts([as_prompt(row_of(kind)) for kind in items_with_response], tokenizer)
    wrong = []
    for (kind, item), prompt in zip(items_with_response.items(), prompts, strict=True):
        if rule.reopens_turn and KINDS[kind][-2]["role"] == "tool":
            continue
        masked = item.ids[: item.response[0]]
        if rule.opens_thinking and masked[: len(prompt.ids)] != prompt.ids:
            opening = tokenizer.decode(masked[-8:] + item.ids[item.response[0] :])
            text = tokenizer.decode(prompt.ids)
            # The prompt differs from the row only in the thinking block at its end.
            if not re.search(r"<think>\n(\n</think>\n\n)?$", text):
                wrong.append(f"{kind}: {text!r} is not the beginning of {opening!r}")
        elif (
            tokenizer.decode(masked)
            not in (
                tokenizer.decode(prompt.ids),
                tokenizer.decode(prompt.ids) + rule.empty_thinking,
            )
            or masked[: len(prompt.ids)] != prompt.ids
        ):
            wrong.append(f"{kind}: {tokenizer.decode(masked)!r} instead of {tokenizer.decode(prompt.ids)!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_and_masked_tokens_together_are_the_rendered_conversation(family: str) -> None:
    tokenizer = tokenizer_of(family)
    for kind, item in encoded_kinds(family).items():
        if not item.rejected:
            assert tokenizer.decode(item.ids) == rendered(row_of(kind), tokenizer), kind


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_a_question_are_ordinary_text_and_no_turn_ends_within_a_response(family: str) -> None:
    tokenizer = tokenizer_of(family)
    added = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    messages = KINDS["special tokens in the texts"]
    harmless_messages = [{**message, "content": message["content"].replace(HOSTILE, "it")} for message in messages]
    (harmless,) = encode_untruncated([{"messages": harmless_messages}], tokenizer, Encoding(10**6))
    actual = encoded_kinds(family)["special tokens in the texts"]

    def control_tokens(item: Encoded, start: int, end: int) -> list[int]:
        return [token for token in item.ids[start:end] if token in added]

    (start, end), (harmless_start, _) = actual.response, harmless.response
    assert control_tokens(actual, 0, start) == control_tokens(harmless, 0, harmless_start)
    ends = {tokenizer.convert_tokens_to_ids(token) for token in chat_template_of(tokenizer).profile.end_tokens}
    assert ends.isdisjoint(actual.ids[start : end - 1])
    assert actual.escaped_tokens > 0
