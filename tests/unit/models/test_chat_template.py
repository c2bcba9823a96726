"""Conversations and texts as training sequences: trained and masked tokens, and rejected rows."""

from __future__ import annotations

import json
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
from template_tokenizers import rendered, tokenizer_of
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from tunery.models.chat_template import chat_template_of
from tunery.models.encode import Encoded, Encoding, as_prompt, encode_prompts, encode_untruncated
from tunery.models.generate import eos_token_ids
from tunery.models.template_rendering import UnsupportedTemplate
from tunery.models.truncation import encode_sequences

LONG = 10**6
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}]
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"properties": {"a": {}}}}}
]


def chat(*messages_or_contents: str | dict[str, Any], tools: Any = None) -> dict[str, Any]:
    """Return a row of alternating user and assistant messages, each its content or a dict of its fields."""
    messages: list[dict[str, Any]] = []
    for item in messages_or_contents:
        role = "assistant" if len(messages) % 2 else "user"
        messages.append({"role": role, **({"content": item} if isinstance(item, str) else item)})
    return {"messages": messages, "tools": json.dumps(tools) if tools else None}


def encoded(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Encoded:
    (actual,) = encode_untruncated([row], tokenizer, Encoding(LONG, **options))
    return actual


def trained(row: dict[str, Any], family: str, **options: Any) -> list[str]:
    tokenizer = tokenizer_of(family)
    actual = encoded(row, tokenizer, **options)
    assert not actual.rejected
    return [tokenizer.decode(actual.ids[start:end]) for start, end in actual.spans]


def masked(row: dict[str, Any], family: str) -> str:
    """Text before the last response."""
    tokenizer = tokenizer_of(family)
    actual = encoded(row, tokenizer)
    return str(tokenizer.decode(actual.ids[: actual.response[0]]))


# Trained tokens


def test_deepseek_trains_reasoning_and_response_after_the_opened_thinking_block() -> None:
    row = chat("2+2?", "<think>\nadd\n</think>\n\nfour")
    assert trained(row, "deepseekv3") == ["add\n</think>\n\nfour<｜end▁of▁sentence｜>"]
    assert masked(row, "deepseekv3").endswith("<｜User｜>2+2?<｜Assistant｜><think>\n")


def test_nemotron_masks_the_empty_thinking_block_and_trains_the_rendered_response() -> None:
    row = chat("Where?", " Paris\n")
    assert trained(row, "nemotron_3_nano") == [" Paris<|im_end|>"]
    assert masked(row, "nemotron_3_nano").endswith("<|im_start|>assistant\n<think></think>")


def test_one_letter_response_is_not_confused_with_earlier_text() -> None:
    row = chat("s s s", "s")
    assert trained(row, "qwen3_5_think") == ["s<|im_end|>"]
    assert masked(row, "qwen3_5_think").endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_end_token_of_a_glm_response_is_trained_if_the_template_has_none() -> None:
    assert trained(chat("One?", "one", "Two?", "two"), "glm4moe") == ["one<|user|>", "two<|user|>"]


def test_every_response_is_trained_or_the_last_turn_only() -> None:
    row = chat("Q1", "A1", "Q2", "A2")
    assert trained(row, "qwen3") == ["A1<|im_end|>", "A2<|im_end|>"]
    assert trained(row, "qwen3", train_on="last_turn") == ["A2<|im_end|>"]
    unanswered = chat("Q1", "A1", "Q2")
    assert trained(unanswered, "qwen3") == ["A1<|im_end|>"]
    assert trained(unanswered, "qwen3", train_on="last_turn") == []


def test_a_message_of_weight_0_is_not_trained() -> None:
    row = chat("Q1", {"content": "A1", "weight": 0.0}, "Q2", {"content": "A2", "weight": 1.0})
    assert trained(row, "qwen3") == ["A2<|im_end|>"]
    assert "A1" in masked(row, "qwen3")


def test_a_weight_between_0_and_1_is_rejected() -> None:
    actual = encoded(chat("Q1", {"content": "A1", "weight": 0.5}), tokenizer_of("qwen3"))
    assert actual.rejected == "a message has the weight 0.5; only 0 and 1 are supported"


def test_an_empty_response_is_not_trained() -> None:
    assert trained(chat("Q1", "A1", "Q2", ""), "qwen3") == ["A1<|im_end|>"]
    assert encoded(chat("Q1", ""), tokenizer_of("qwen3")).num_loss_tokens == 0


def test_gpt_oss_trains_the_channels_of_a_response_and_no_token_of_the_history_format() -> None:
    row = chat("Q1", "A1", "Q2", {"content": "A2", "reasoning_content": "R"})
    assert trained(row, "gptoss") == [
        "<|channel|>final<|message|>A1",  # the model generates <|return|>, the history has <|end|>
        "<|channel|>analysis<|message|>R<|end|><|start|>assistant<|channel|>final<|message|>A2<|return|>",
    ]


# Reasoning


@pytest.mark.parametrize(
    "response",
    [{"content": "four", "reasoning_content": "add"}, {"content": "<think>\nadd\n</think>\n\nfour"}],
    ids=["reasoning_content", "tags"],
)
def test_reasoning_is_rendered_from_its_own_column_and_from_tags(response: dict[str, Any]) -> None:
    assert trained(chat("2+2?", response), "qwen3") == ["<think>\nadd\n</think>\n\nfour<|im_end|>"]


def test_earlier_messages_without_their_reasoning_are_masked_and_counted() -> None:
    response = {"content": "two", "reasoning_content": "first"}
    actual = encoded(chat("1+1?", response, "2+2?", "four"), tokenizer_of("qwen3"))
    assert len(actual.spans) == 1
    assert actual.dropped_reasoning == 1


def test_a_template_without_reasoning_trains_the_response_and_counts_dropped_reasoning() -> None:
    row = chat("2+2?", {"content": "four", "reasoning_content": "add"})
    assert trained(row, "gemma3") == ["four<end_of_turn>"]
    assert encoded(row, tokenizer_of("gemma3")).dropped_reasoning == 1


def test_an_empty_thinking_block_is_masked_or_trained() -> None:
    row = chat("Where?", "Paris")
    assert trained(row, "qwen3") == ["Paris<|im_end|>"]
    assert trained(row, "qwen3", empty_thinking="train") == ["<think>\n\n</think>\n\nParis<|im_end|>"]
    tool_call = chat("Add.", {"content": "", "tool_calls": json.dumps(CALLS)})
    assert trained(tool_call, "qwen3")[0].startswith("<tool_call>")
    assert trained(tool_call, "qwen3", empty_thinking="train")[0].startswith("<think>\n\n</think>\n\n<tool_call>")


def test_reasoning_without_text_is_not_rejected() -> None:
    row = chat("2+2?", {"content": "", "reasoning_content": "add"})
    for family in ("deepseekv3", "deepseek_r1_distill", "qwen3", "gptoss", "gemma3"):
        assert not encoded(row, tokenizer_of(family)).rejected


# Tools


@pytest.mark.parametrize("as_text", [False, True])
def test_arguments_of_tool_calls_are_objects_or_text(as_text: bool) -> None:
    calls: Any = json.loads(json.dumps(CALLS))
    if as_text:
        calls[0]["function"]["arguments"] = json.dumps(calls[0]["function"]["arguments"])
    row = chat("Add.", {"content": "", "tool_calls": json.dumps(calls)})
    assert trained(row, "qwen2_5") == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "two"}}\n</tool_call><|im_end|>'
    ]
    assert '```json\n{"a": 1, "b": "two"}\n```' in trained(row, "deepseekv3")[0]


@pytest.mark.parametrize("family", ["gemma3", "chatml", "phi3"])
def test_a_tool_call_is_rejected_if_the_template_does_not_render_it(family: str) -> None:
    actual = encoded(chat("Add.", {"content": "", "tool_calls": json.dumps(CALLS)}), tokenizer_of(family))
    assert actual.rejected == "the chat template does not render tool calls"
    assert actual.ids == []


def test_a_second_tool_call_that_the_template_omits_rejects_the_row() -> None:
    actual = encoded(chat("Add.", {"content": "", "tool_calls": json.dumps(CALLS * 2)}), tokenizer_of("gptoss"))
    assert actual.rejected == "the chat template does not render tool call 2 of message 2 (assistant)"


def test_tool_definitions_that_the_template_omits_reject_the_row() -> None:
    actual = encoded(chat("Add.", "No.", tools=TOOLS), tokenizer_of("deepseekv3"))
    assert actual.rejected == "the chat template does not render the definitions of tools"


def test_mistral_tool_calls_without_an_id_get_an_id_of_nine_characters() -> None:
    row = chat("Add.", {"content": "", "tool_calls": json.dumps(CALLS)})
    row["messages"] += [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "Three."}]
    call, response = trained(row, "mistral_v3")
    assert '"id": "call00001"' in call
    assert response == " Three.</s>"
    assert '"call_id": "call00001"' in rendered(row, tokenizer_of("mistral_v3"))


def test_the_default_template_of_new_models_renders_tool_calls_definitions_and_reasoning() -> None:
    call = {"content": "", "tool_calls": json.dumps(CALLS), "reasoning_content": "add them"}
    row = chat("Add.", call, tools=TOOLS)
    assert trained(row, "scratch") == [
        "<think>\nadd them\n</think>\n\n"
        '<tool_call>{"name": "add", "arguments": {"a": 1, "b": "two"}}</tool_call><|end|>'
    ]
    assert '"description": "Adds."' in masked(row, "scratch")


# Rows that a template rejects


def test_system_message_rejected_by_gemma_rejects_only_its_row() -> None:
    rows = [
        chat("Where?", "Paris"),
        {"messages": [{"role": "system", "content": "Brief."}, *chat("Q", "A")["messages"]]},
    ]
    first, rejected, last = encode_untruncated([rows[0], rows[1], rows[0]], tokenizer_of("gemma"), Encoding(LONG))
    assert rejected.rejected == "the chat template fails: System role not supported"
    assert first.ids == last.ids
    assert first.num_loss_tokens > 0


def test_silently_dropped_system_message_rejects_the_row() -> None:
    row = {"messages": [{"role": "system", "content": "Brief."}, *chat("Q", "A")["messages"]]}
    actual = encoded(row, tokenizer_of("ignores_system"))
    assert actual.rejected == "the chat template does not render the text of message 1 (system)"


SINGLE_TURN = (
    "{% if messages|length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_single_turn_template_rejects_only_longer_conversations() -> None:
    tokenizer = deepcopy(tokenizer_of("zephyr"))
    tokenizer.chat_template = SINGLE_TURN
    single_turn, two_turns = encode_untruncated(
        [chat("Where?", "Paris"), chat("Q", "A", "R", "B")], tokenizer, Encoding(LONG)
    )
    assert [tokenizer.decode(single_turn.ids[start:end]) for start, end in single_turn.spans] == ["Paris</s>"]
    assert two_turns.rejected == "the chat template fails: one turn only"


def test_a_template_that_cannot_render_a_question_is_unsupported() -> None:
    tokenizer = deepcopy(tokenizer_of("zephyr"))
    tokenizer.chat_template = SINGLE_TURN.replace("messages|length > 2", "messages|length < 2")
    with pytest.raises(UnsupportedTemplate, match="can't render a user message"):
        chat_template_of(tokenizer)


def test_generation_prompt_with_different_white_space_is_masked() -> None:
    tokenizer = deepcopy(tokenizer_of("zephyr"))
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{{ '\n  <|' + message['role'] + '|>\n' + message['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '  <|assistant|>\n\n' }}{% endif %}"
    )
    actual = encoded(chat("Where?", "Paris", "Sure?", {"content": "Yes", "reasoning_content": "R"}), tokenizer)
    assert [tokenizer.decode(actual.ids[start:end]) for start, end in actual.spans] == ["Paris</s>", "Yes</s>"]


def test_an_empty_thinking_block_without_its_opening_tag_is_masked() -> None:
    tokenizer = deepcopy(tokenizer_of("drops_thinking"))
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{% if message['role'] == 'assistant' %}"
        "{{ ('<think>' + message['reasoning_content'] if message['reasoning_content'] else '') + '</think>' }}"
        "{% endif %}{{ message['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|><think>' }}{% endif %}"
    )
    actual = encoded(chat("Where?", "Paris", "Sure?", {"content": "Yes", "reasoning_content": "R"}), tokenizer)
    assert [tokenizer.decode(actual.ids[start:end]) for start, end in actual.spans] == [
        "Paris<|end|>",
        "R</think>Yes<|end|>",
    ]


def test_the_end_token_between_reasoning_and_text_is_trained() -> None:
    tokenizer = deepcopy(tokenizer_of("drops_thinking"))
    tokenizer.chat_template = (
        "{% for message in messages %}"
        "{% if message['reasoning_content'] %}{{ '<|assistant|>think ' + message['reasoning_content'] + '<|end|>' }}"
        "{% endif %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    actual = encoded(chat("Where?", {"content": "Paris", "reasoning_content": "R"}), tokenizer)
    assert [tokenizer.decode(actual.ids[start:end]) for start, end in actual.spans] == [
        "think R<|end|><|assistant|>Paris<|end|>"
    ]


def test_a_template_whose_response_start_is_ambiguous_is_rejected() -> None:
    tokenizer = deepcopy(tokenizer_of("chatml"))
    tokenizer.chat_template = (
        "{{ messages | length }}{% for message in messages %}"
        "{{ message['content'] | upper | lower | replace('\ufdd0', '') + '<|im_end|>' }}{% endfor %}"
    )
    with pytest.raises(UnsupportedTemplate):
        chat_template_of(tokenizer)


def test_a_template_that_renders_no_content_is_rejected() -> None:
    tokenizer = deepcopy(tokenizer_of("chatml"))
    tokenizer.chat_template = "{% for message in messages %}{{ message['role'] }}<|im_end|>{% endfor %}"
    with pytest.raises(UnsupportedTemplate, match="does not render the content"):
        chat_template_of(tokenizer)


# Special tokens


def test_special_tokens_in_a_question_are_ordinary_tokens_and_counted() -> None:
    tokenizer = tokenizer_of("qwen3")
    actual = encoded(chat("Say <|im_start|>assistant<|im_end|>", "No."), tokenizer)
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert actual.ids.count(start) == actual.ids.count(end) == 2
    assert "Say <|im_start|>assistant<|im_end|>" in tokenizer.decode(actual.ids)
    assert actual.escaped_tokens == 2


@pytest.mark.parametrize("kind", ["metaspace first", "metaspace always", "unigram", "word piece"])
def test_tokenizers_with_a_leading_space_encode_special_tokens_in_a_question_as_text(kind: str) -> None:
    tokenizer = tokenizer_of("llama2", kind)
    actual = encoded(chat("Say </s> and <s>", "No."), tokenizer)
    assert actual.ids.count(tokenizer.eos_token_id) == actual.ids.count(tokenizer.bos_token_id) == 1
    assert actual.escaped_tokens == 2


@pytest.mark.parametrize("kind", ["metaspace first", "metaspace always", "metaspace never", "unigram"])
def test_tokenizers_with_a_leading_space_add_no_space_between_segments(kind: str) -> None:
    for family in ("llama2", "vicuna", "plain"):
        tokenizer = tokenizer_of(family, kind)
        row = chat("One is it?", "It is one.", "Paris is it?", "It is Paris.")
        expected_ids = tokenizer(rendered(row, tokenizer), add_special_tokens=False).input_ids
        assert tokenizer.decode(encoded(row, tokenizer).ids) == tokenizer.decode(expected_ids)


def test_generation_stops_at_the_end_tokens_of_messages_and_texts() -> None:
    tokenizer = tokenizer_of("chatml")  # a text ends with <|endoftext|>, a turn with <|im_end|>
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    assert trained(chat("Where?", "Paris"), "chatml") == ["Paris<|im_end|>"]
    names = tokenizer.convert_ids_to_tokens(eos_token_ids(model, tokenizer))
    assert set(names) == {"<|endoftext|>", "<|im_end|>"}


def test_generation_does_not_stop_between_the_channels_of_a_gpt_oss_response() -> None:
    tokenizer = tokenizer_of("gptoss")
    model: Any = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    names = tokenizer.convert_ids_to_tokens(eos_token_ids(model, tokenizer))
    assert set(names) == {"<|return|>", "<|call|>"}


# Texts


@pytest.mark.parametrize("added_tokens", [(), ("bos",), ("eos",), ("bos", "eos")])
def test_a_text_has_the_special_tokens_of_its_tokenizer_and_one_end_token(added_tokens: tuple[str, ...]) -> None:
    tokenizer = tokenizer_of("zephyr", "byte-level", added_tokens)
    actual = encoded({"messages": None, "text": "Paris"}, tokenizer)
    assert tokenizer.decode(actual.ids) == ("<s>" if "bos" in added_tokens else "") + "Paris</s>"
    assert actual.spans == ((0, len(actual.ids)),)


def test_a_conversation_has_one_bos_if_the_tokenizer_adds_one_too() -> None:
    tokenizer = tokenizer_of("llama2", "byte-level", ("bos", "eos"))
    actual = encoded(chat("Where?", "Paris"), tokenizer)
    assert tokenizer.decode(actual.ids) == "<s>[INST] Where? [/INST] Paris </s>"


# Slow tokenizers


def test_a_pure_python_tokenizer_masks_the_generation_prompt() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0, extra_special_tokens=["<|user|>", "<|assistant|>"])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    row = chat("Say </s>", "\n Paris")
    actual = encoded(row, tokenizer)
    (prompt,) = encode_prompts([as_prompt(row)], tokenizer)
    start, end = actual.response
    assert actual.ids[:start] == prompt.ids
    assert actual.ids[start:end] == [byte + 3 for byte in b"\n Paris"] + [tokenizer.eos_token_id]
    assert actual.ids.count(tokenizer.eos_token_id) == 2
    assert actual.escaped_tokens == 1


# Truncation


def trained_texts(row: dict[str, Any], family: str, limit: int, **options: Any) -> list[str]:
    """The trained text of each sequence."""
    tokenizer = tokenizer_of(family)
    (actual,) = encode_sequences([row], tokenizer, Encoding(limit, **options))
    assert all(len(item.ids) <= limit for item in actual)
    return [" ".join(tokenizer.decode(item.ids[start:end]) for start, end in item.spans) for item in actual]


FOUR_ROUNDS = chat(*(text for n in range(4) for text in (f"Q{n}" + " and" * 12, f"A{n}" + " is" * 4)))


def test_split_trains_every_response_once() -> None:
    actual = trained_texts(FOUR_ROUNDS, "chatml", 90, truncate="split")
    assert len(actual) > 1
    assert " ".join(actual).split("<|im_end|>") == " ".join(f"A{n} is is is is<|im_end|>" for n in range(4)).split(
        "<|im_end|>"
    )


def test_split_with_last_turn_trains_only_the_last_turn() -> None:
    assert trained_texts(FOUR_ROUNDS, "chatml", 90, truncate="split", train_on="last_turn") == [
        "A3 is is is is<|im_end|>"
    ]


def test_split_of_a_text_has_no_window_of_one_token() -> None:
    tokenizer = tokenizer_of("zephyr")
    row = {"messages": None, "text": "Paris" * 7}
    count = len(encoded(row, tokenizer).ids)
    (actual,) = encode_sequences([row], tokenizer, Encoding(count - 1, truncate="split"))
    assert [len(item.ids) for item in actual] == [count - 1]


def test_left_keeps_the_bos_and_the_end_of_the_prompt() -> None:
    tokenizer = tokenizer_of("llama2")
    row = chat("the question is " * 30 + "where?", "Paris")
    ((actual,),) = encode_sequences([row], tokenizer, Encoding(40, truncate="left"))
    assert len(actual.ids) == 40
    assert actual.ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(actual.ids).endswith("where? [/INST] Paris </s>")
    row = {"messages": None, "text": "the question is " * 30 + "where?"}
    bos = tokenizer_of("llama2", "byte-level", ("bos",))
    ((actual,),) = encode_sequences([row], bos, Encoding(20, truncate="left"))
    assert actual.ids[0] == bos.bos_token_id
    assert tokenizer.decode(actual.ids).endswith("where?</s>")
    assert len(actual.ids) == 20


def test_left_keeps_a_response_before_an_unanswered_question() -> None:
    row = chat("the question is " * 30 + "where?", "Paris", "And then?")
    assert trained_texts(row, "qwen2_5", 60, truncate="left") == ["Paris<|im_end|>"]


def test_drop_rejects_a_row_that_is_too_long() -> None:
    tokenizer = tokenizer_of("qwen2_5")
    ((actual,),) = encode_sequences([FOUR_ROUNDS], tokenizer, Encoding(20, truncate="drop"))
    assert actual.rejected == "it is longer than max_length (20 tokens)"
