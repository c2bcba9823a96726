"""Rows as a model reads them: trained, masked, special and truncated tokens, in every row format."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from small_classifiers import write_encoder
from template_tokenizers import tokenizer_of

from tunery.models.encode import Encoding, Truncation, encode_untruncated
from tunery.models.preview import InputFormat, preview_records, preview_rows, stage_preview, template_summary
from tunery.models.preview_sequences import PreviewRow, PreviewSequence, token_groups
from tunery.models.preview_truncation import UNKNOWN_CUT
from tunery.models.scratch import train_tokenizer
from tunery.models.truncation import encode_sequences
from tunery.spec import Sft
from tunery.store.rows import Row

TEXTS = ["What is the capital of France? Paris. The quick brown fox answers the user briefly."] * 3
GEMMA_LIKE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHAT = [("user", "Capital?"), ("assistant", "Paris."), ("user", "And of China? 中国"), ("assistant", "北京 🏯.\nYes.")]
CHINESE = "中华人民共和国的首都是北京。🏯👨‍👩‍👧 ž\ufffd."


@pytest.fixture
def tokenizer() -> Any:
    return train_tokenizer(TEXTS, 360)


def chat(*turns: tuple[str, str], **columns: Any) -> Row:
    messages = [{"role": role, "content": content, "tool_calls": None} for role, content in turns]
    return {"id": "0f", "text": None, "messages": messages, "source": "a.jsonl", "line": 3, **columns}


def pair(prompt: str, chosen: str, rejected: str) -> Row:
    return chat(("user", prompt), ("assistant", chosen), rejected=[{"role": "assistant", "content": rejected}])


def text(content: str) -> Row:
    return {"id": "1f", "text": content, "messages": None, "source": "a.txt", "line": 1}


def only(rows: list[PreviewRow]) -> PreviewSequence:
    ((sequence,),) = [row.sequences for row in rows]
    return sequence


def kinds(sequence: PreviewSequence) -> list[tuple[str, str]]:
    return [(f"{segment.kind}{' special' if segment.special else ''}", segment.text) for segment in sequence.segments()]


def test_every_response_of_a_conversation_is_trained_with_its_end_token(tokenizer: Any) -> None:
    displayed = only(preview_rows([chat(*CHAT)], tokenizer, Encoding(200), "conversation"))
    assert kinds(displayed) == [
        ("masked special", "<|user|>"),
        ("masked", "Capital?"),
        ("masked special", "<|end|><|assistant|>"),
        ("trained", "Paris."),
        ("trained special", "<|end|>"),
        ("masked special", "<|user|>"),
        ("masked", "And of China? 中国"),
        ("masked special", "<|end|><|assistant|>"),
        ("trained", "北京 🏯.\nYes."),
        ("trained special", "<|end|>"),
    ]


def test_preview_has_the_tokens_and_the_mask_of_training(tokenizer: Any) -> None:
    rows = [chat(*CHAT), chat(*CHAT[:2])]
    for row, (encoded,) in zip(rows, encode_sequences(rows, tokenizer, Encoding(40)), strict=True):
        displayed = only(preview_rows([row], tokenizer, Encoding(40), "conversation"))
        assert list(displayed.ids) == encoded.ids
        assert sorted(displayed.trained) == encoded.loss_indices


def test_train_on_last_turn_trains_only_the_last_response(tokenizer: Any) -> None:
    displayed = only(preview_rows([chat(*CHAT)], tokenizer, Encoding(200, "last_turn"), "conversation"))
    assert "".join(part for kind, part in kinds(displayed) if kind.startswith("trained")) == "北京 🏯.\nYes.<|end|>"


def test_removed_tokens_are_shown_after_kept_ones(tokenizer: Any) -> None:
    displayed = only(preview_rows([chat(*CHAT)], tokenizer, Encoding(20), "conversation"))
    assert displayed.truncated
    assert kinds(displayed)[:6] == [
        ("masked special", "<|user|>"),
        ("masked", "Capital?"),
        ("masked special", "<|end|><|assistant|>"),
        ("trained", "Paris."),
        ("trained special", "<|end|>"),
        ("mark", "cut off"),
    ]
    assert "".join(part for kind, part in kinds(displayed) if kind.startswith("cut")) == (
        "<|user|>And of China? 中国<|end|><|assistant|>北京 🏯.\nYes.<|end|>"
    )


def test_removed_oldest_messages_are_shown_before_kept_tokens(tokenizer: Any) -> None:
    rows = [chat(("system", "Be brief."), *CHAT)]
    (full,) = encode_untruncated(rows, tokenizer, Encoding(500))
    encoding = Encoding(len(full.ids) - 1, truncate="left")
    displayed = kinds(only(preview_rows(rows, tokenizer, encoding, "conversation")))
    mark_index = [kind for kind, _ in displayed].index("mark")
    assert "".join(part for _, part in displayed[:mark_index]) == "<|system|>Be brief.<|end|>"
    assert "".join(part for kind, part in displayed if kind.startswith("cut")) == (
        "<|user|>Capital?<|end|><|assistant|>Paris.<|end|>"
    )


def truncate_left(
    row: Row, tokenizer: Any, limit: int, input_format: InputFormat = "conversation", **options: Any
) -> PreviewRow:
    (displayed,) = preview_rows([row], tokenizer, Encoding(limit, truncate="left"), input_format, **options)
    return displayed


def text_with_cuts(sequence: PreviewSequence) -> str:
    """The text of a sequence, with truncated text in ⟪⟫ and marks in «»."""
    texts = []
    for kind, group in groupby(sequence.segments(), key=lambda segment: segment.kind):
        text = "".join(segment.text for segment in group)
        texts.append({"cut": f"⟪{text}⟫", "mark": f"«{text}»"}.get(kind, text))
    return "".join(texts)


# A digit and a capital letter are a token each.
LONG_RESPONSE = "ABCDEFGHIJKLMNOPQRST"


def test_cuts_of_prompt_start_and_response_end_are_shown(tokenizer: Any) -> None:
    row = chat(("user", "0123456789"), ("assistant", LONG_RESPONSE))
    (displayed,) = truncate_left(row, tokenizer, 16).sequences
    assert kinds(displayed) == [
        ("mark", "cut off"),
        ("cut special", "<|user|>"),
        ("cut", "01234567"),
        ("mark", "end of what is cut off"),
        ("masked", "89"),
        ("masked special", "<|end|><|assistant|>"),
        ("trained", "ABCDEFGHIJKL"),
        ("mark", "cut off"),
        ("cut", "MNOPQRST"),
        ("cut special", "<|end|>"),
    ]
    assert (displayed.cut_tokens, displayed.notes) == (18, ())
    assert displayed.as_json()["cuts"] == [
        {"index": 0, "num_tokens": 9, "text": "<|user|>01234567"},
        {"index": 16, "num_tokens": 9, "text": "MNOPQRST<|end|>"},
    ]


@pytest.mark.parametrize(
    ("rejected", "end"),
    [
        (LONG_RESPONSE[::-1], "TSRQPONMLKJI«cut off»⟪HGFEDCBA<|end|>⟫"),
        ("TSRQ", "TSRQ<|end|>"),
    ],
    ids=["both long", "one long"],
)
@pytest.mark.parametrize("input_format", ["pair", "rated"])
def test_both_sides_of_a_pair_show_the_same_cut_of_the_prompt_and_their_own_cut_of_the_response(
    tokenizer: Any, rejected: str, end: str, input_format: InputFormat
) -> None:
    row = truncate_left(pair("0123456789", LONG_RESPONSE, rejected), tokenizer, 16, input_format)
    prompt = "«cut off»⟪<|user|>01234567⟫«end of what is cut off»89<|end|><|assistant|>"
    assert [text_with_cuts(sequence) for sequence in row.sequences] == [
        f"{prompt}ABCDEFGHIJKL«cut off»⟪MNOPQRST<|end|>⟫",
        f"{prompt}{end}",
    ]


def test_reward_pair_shows_the_cuts_of_both_sides(tokenizer: Any, tmp_path: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(write_encoder(tmp_path, ["bad", "good"]))
    row = truncate_left(pair("0123456789", LONG_RESPONSE, "TSRQ"), tokenizer, 16, "reward_pair", model=model)
    cut_end = "⟫«end of what is cut off»"
    assert [text_with_cuts(sequence) for sequence in row.sequences] == [
        f"«cut off»⟪<|user|>01234567{cut_end}89<|end|><|assistant|>ABCDEFGHIJKL«cut off»⟪MNOPQRST<|end|>⟫",
        f"«cut off»⟪<|user|>0{cut_end}123456789<|end|><|assistant|>TSRQ<|end|>",
    ]


def test_text_after_the_eos_token_of_a_pair_is_not_a_cut() -> None:
    row = truncate_left(pair("0123456789", LONG_RESPONSE, "TSRQ"), tokenizer_of("qwen3"), 40, "pair")
    assert [sequence.truncated for sequence in row.sequences] == [True, True]
    assert [text_with_cuts(sequence)[-len("<|im_end|>") :] for sequence in row.sequences] == ["<|im_end|>"] * 2


def test_cuts_of_system_message_oldest_messages_and_response_are_separate(tokenizer: Any) -> None:
    messages = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", LONG_RESPONSE)]
    (displayed,) = truncate_left(chat(("system", "0123456789"), *messages), tokenizer, 24).sequences
    assert text_with_cuts(displayed) == (
        "«cut off»⟪<|system|>012345678⟫«end of what is cut off»9<|end|>"
        "«cut off»⟪<|user|>1<|end|><|assistant|>2<|end|>⟫«end of what is cut off»"
        "<|user|>3<|end|><|assistant|>ABCDEFGHIJKLMNOPQR«cut off»⟪ST<|end|>⟫"
    )


def test_oldest_of_equal_messages_are_shown_as_removed(tokenizer: Any) -> None:
    messages = [("user", "1"), ("assistant", "2")] * 3
    (displayed,) = truncate_left(chat(("system", "0"), *messages), tokenizer, 16).sequences
    removed_turn = "<|user|>1<|end|><|assistant|>2<|end|>"
    assert (
        text_with_cuts(displayed)
        == f"<|system|>0<|end|>«cut off»⟪{removed_turn}⟫«end of what is cut off»{removed_turn}{removed_turn}"
    )


def test_kept_bos_token_is_shown_before_the_cut() -> None:
    row = chat(("user", "0123456789 " * 4), ("assistant", "OK"))
    (displayed,) = truncate_left(row, tokenizer_of("llama3"), 30).sequences
    assert text_with_cuts(displayed).startswith("<|bos|>«cut off»⟪<|start_header_id|>user<|end_header_id|>")


@pytest.mark.parametrize("limit", [14, 30, 48, 66])
@pytest.mark.parametrize("truncate", ["left", "right", "drop"])
@pytest.mark.parametrize("family", ["scratch", "qwen3", "llama3", "mistral_v3"])
def test_kept_and_removed_tokens_form_the_complete_conversation(family: str, truncate: Truncation, limit: int) -> None:
    messages = [("user", "one fox"), ("assistant", "yes"), *CHAT, ("user", "one fox"), ("assistant", "yes " * 12)]
    row, tokenizer = chat(*messages), tokenizer_of(family)
    (full,) = encode_untruncated([row], tokenizer, Encoding(999))
    displayed = only(preview_rows([row], tokenizer, Encoding(limit, truncate=truncate), "conversation"))
    ids = list(displayed.ids)
    for cut in reversed(displayed.cuts):
        ids[cut.index : cut.index] = [token for group in cut.groups for token in group.ids]
    assert ids == full.ids
    assert displayed.cut_tokens == len(full.ids) - len(displayed.ids)


def test_cut_with_unknown_position_is_noted() -> None:
    # Llama 2's template puts the system message into the first user message, which changes when turns are removed.
    messages = [("user", "one fox"), ("assistant", "yes"), ("user", "two"), ("assistant", "no")]
    row, tokenizer = chat(("system", "Be brief."), *messages), tokenizer_of("llama2")
    (full,) = encode_untruncated([row], tokenizer, Encoding(999))
    (displayed,) = truncate_left(row, tokenizer, len(full.ids) - 1).sequences
    assert displayed.truncated
    assert displayed.cut_tokens == len(full.ids) - len(displayed.ids)
    assert displayed.notes == (UNKNOWN_CUT,)
    assert {kind for kind, _ in kinds(displayed)}.isdisjoint({"cut", "cut special", "mark"})


def test_parts_of_a_split_conversation_are_numbered_and_complete(tokenizer: Any) -> None:
    rows = [chat(*CHAT)]
    (full,) = encode_untruncated(rows, tokenizer, Encoding(500))
    encoding = Encoding(len(full.ids) - 1, truncate="split")
    (row,) = preview_rows(rows, tokenizer, encoding, "conversation")
    assert [sequence.label for sequence in row.sequences] == ["part 1 of 2", "part 2 of 2"]
    assert not any(sequence.cuts for sequence in row.sequences)


def test_row_longer_than_max_length_shows_reason_and_text_with_drop(tokenizer: Any) -> None:
    displayed = only(preview_rows([chat(*CHAT)], tokenizer, Encoding(20, truncate="drop"), "conversation"))
    assert "max_length (20 tokens)" in displayed.reason
    assert "".join(part for kind, part in kinds(displayed) if kind.startswith("cut")).endswith("Yes.<|end|>")


def test_conversation_that_the_template_rejects_shows_its_reason(tokenizer: Any) -> None:
    tokenizer.chat_template = GEMMA_LIKE
    displayed = only(preview_rows([chat(("system", "Be brief."), *CHAT)], tokenizer, Encoding(99), "conversation"))
    assert displayed.reason == "the chat template fails: System role not supported"
    assert displayed.ids == ()


def test_completely_truncated_response_is_reported_as_untrained(tokenizer: Any) -> None:
    rows = [chat(*CHAT[:2])]
    (full,) = encode_untruncated(rows, tokenizer, Encoding(500))
    displayed = only(preview_rows(rows, tokenizer, Encoding(full.response[0]), "conversation"))
    assert "no response is left to train on" in displayed.reason


def test_special_token_in_row_text_is_not_special(tokenizer: Any) -> None:
    rows = [chat(("user", "a <|end|> b"), ("assistant", "c"))]
    displayed = only(preview_rows(rows, tokenizer, Encoding(99), "conversation"))
    assert ("masked", "a <|end|> b") in kinds(displayed)
    assert displayed.notes == ("a special token in the row's own text is encoded as ordinary text",)


def test_both_responses_of_a_pair_end_with_their_end_token(tokenizer: Any) -> None:
    (row,) = preview_rows([pair("Capital?", "Paris.", "Fox.")], tokenizer, Encoding(99), "pair")
    assert [sequence.label for sequence in row.sequences] == ["chosen", "rejected"]
    assert [kinds(sequence)[-2:] for sequence in row.sequences] == [
        [("trained", "Paris."), ("trained special", "<|end|>")],
        [("trained", "Fox."), ("trained special", "<|end|>")],
    ]


def test_pair_with_equal_truncated_responses_is_not_used(tokenizer: Any) -> None:
    long = "The quick brown fox answers the user briefly."
    (row,) = preview_rows([pair("?", f"{long} Yes", f"{long} No")], tokenizer, Encoding(8), "pair")
    assert row.reason == "both responses are the same after truncation"


def test_row_without_a_rejected_response_is_not_a_pair(tokenizer: Any) -> None:
    (row,) = preview_rows([chat(*CHAT)], tokenizer, Encoding(99), "pair")
    assert (row.reason, row.sequences) == ("it is not a preference pair", ())


def test_rated_responses_say_which_is_desirable(tokenizer: Any) -> None:
    rows = [chat(*CHAT[:2], label=False), pair("Capital?", "Paris.", "Fox."), chat(*CHAT[:2])]
    displayed = preview_rows(rows, tokenizer, Encoding(99), "rated")
    labels = [[sequence.label for sequence in row.sequences] for row in displayed]
    assert labels == [["undesirable"], ["desirable", "undesirable"], []]
    assert displayed[2].reason == "it has no label"


def test_prompt_ends_where_generation_begins_and_has_no_mask(tokenizer: Any) -> None:
    displayed = only(preview_rows([chat(*CHAT[:2])], tokenizer, Encoding(99), "prompt"))
    assert kinds(displayed) == [
        ("input special", "<|user|>"),
        ("input", "Capital?"),
        ("input special", "<|end|><|assistant|>"),
        ("mark", "generation begins here"),
    ]


def test_prompt_that_is_too_long_has_a_reason(tokenizer: Any) -> None:
    displayed = only(preview_rows([chat(*CHAT)], tokenizer, Encoding(9), "prompt"))
    assert "max_length allows 9" in displayed.reason


def test_documents_show_their_end_tokens_and_where_blocks_begin(tokenizer: Any) -> None:
    rows = [text("Paris. Paris."), text("The quick brown fox")]
    lengths = [len(item.ids) for item in encode_untruncated(rows, tokenizer, Encoding(5))]
    displayed = [only([row]) for row in preview_rows(rows, tokenizer, Encoding(5), "documents")]
    block_starts = [
        index - offset
        for offset, sequence in zip((0, lengths[0]), displayed, strict=True)
        for index, _ in sequence.marks
    ]
    assert [text for sequence in displayed for _, text in sequence.marks] == [
        f"block {number} begins" for number in range(1, 2 + (sum(lengths) - 1) // 5)
    ]
    assert block_starts
    for sequence, start in zip(displayed, (0, lengths[0]), strict=True):
        assert all((start + index) % 5 == 0 for index, _ in sequence.marks)
        assert {index for index, _ in sequence.marks} == set(range(len(sequence.ids))) - sequence.trained
        assert (sequence.groups[-1].text, sequence.groups[-1].special) == ("<|end|>", True)


def test_blocks_of_a_later_document_continue_the_earlier_ones(tokenizer: Any) -> None:
    rows = [text("Paris. Paris."), text("The quick brown fox")]
    both = preview_rows(rows, tokenizer, Encoding(5), "documents")
    assert preview_rows(rows, tokenizer, Encoding(5), "documents", skip=1) == both[1:]


def test_ifd_scores_the_response_after_the_prompt_and_without_it(tokenizer: Any) -> None:
    (row,) = preview_rows([chat(*CHAT[:2])], tokenizer, Encoding(99), "ifd")
    assert [sequence.label for sequence in row.sequences] == ["after the prompt", "without the prompt"]
    assert kinds(row.sequences[1]) == [
        ("masked special", "<|assistant|>"),
        ("trained", "Paris."),
        ("trained special", "<|end|>"),
    ]


def test_classifier_without_a_template_gets_question_and_response_as_a_pair_of_texts(tmp_path: Any) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = write_encoder(tmp_path, ["bad", "good"])
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    row = chat(("user", "why how"), ("assistant", "because so"))
    displayed = only(preview_rows([row], tokenizer, Encoding(32), "classifier", model=model))
    assert [segment.text.strip() for segment in displayed.segments()] == [
        "[CLS]",
        "why how",
        "[SEP]",
        "because so",
        "[SEP]",
    ]
    assert {segment.kind for segment in displayed.segments()} == {"input"}


def test_cut_in_one_text_of_a_pair_is_shown_and_cuts_in_both_are_noted(tmp_path: Any) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = write_encoder(tmp_path, ["bad", "good"])
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    long = chat(("user", "why how"), ("assistant", "because so because so because"))
    (response_cut,) = truncate_left(long, tokenizer, 8, "classifier", model=model).sequences
    assert [(part.kind, part.text.strip()) for part in response_cut.segments()][-4:] == [
        ("mark", "cut off"),
        ("cut", "so because"),
        ("mark", "end of what is cut off"),
        ("input", "[SEP]"),
    ]
    (both_cut,) = truncate_left(long, tokenizer, 6, "classifier", model=model).sequences
    assert (both_cut.cuts, both_cut.cut_tokens, both_cut.notes) == ((), 4, (UNKNOWN_CUT,))


@pytest.mark.parametrize("content", [CHINESE, "plain words", " leading", "tab\tand\nline", "e\u0301 \u202e x", ""])
def test_token_groups_concatenate_to_the_text(tokenizer: Any, content: str) -> None:
    ids = tokenizer(content, add_special_tokens=False)["input_ids"]
    groups = list(token_groups(ids, tokenizer))
    assert "".join(group.text for group in groups) == content
    assert [token for group in groups for token in group.ids] == ids


def test_character_of_several_tokens_is_one_group(tokenizer: Any) -> None:
    (group,) = token_groups(tokenizer("京")["input_ids"], tokenizer)
    assert (group.text, len(group.ids)) == ("京", 3)


def test_tokenizer_that_drops_the_first_space_keeps_those_between_words() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # As Llama 2's: words begin with ▁, and the decoder drops the first one.
    model = models.WordLevel({"<unk>": 0, "▁one": 1, "▁two": 2}, unk_token="<unk>")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    groups = list(token_groups([1, 2, 1], PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")))
    assert [group.text for group in groups] == ["one", " two", " one"]


def test_record_omits_the_middle_of_a_long_sequence(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunery.models.preview.MAX_RECORD_TOKENS", 8)
    ((record,),) = [preview_records([chat(*CHAT)], tokenizer, Encoding(200))]
    (sequence,) = record["sequences"]
    (mark,) = [item for kind, item, _ in sequence["segments"] if kind == "mark"]
    assert mark.endswith("tokens are omitted here")
    assert sequence["num_tokens"] > 8
    assert sequence["segments"][-1] == ["trained", "<|end|>", 1]


def test_long_document_is_not_decoded_completely(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunery.models.preview.MAX_RECORD_TOKENS", 40)
    row = text("The quick brown fox. " * 5_000)
    (encoded,) = encode_untruncated([row], tokenizer, Encoding(16))
    decoded = 0
    decode = type(tokenizer).decode

    def counted_decode(self: Any, ids: Any, **options: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return decode(self, ids, **options)

    monkeypatch.setattr(type(tokenizer), "decode", counted_decode)
    (record,) = preview_records([row], tokenizer, Encoding(16), input_format="documents")
    segments = record["sequences"][0]["segments"]
    assert 0 < decoded < 200
    assert segments[0] == ["mark", "block 1 begins", 0]
    (omitted,) = [item for kind, item, _ in segments if kind == "mark" and "tokens are omitted" in item]
    item = "".join(item for kind, item, _ in segments if kind != "mark")
    kept = len(tokenizer(item.removesuffix("<|end|>"))["input_ids"])
    assert int(omitted.split()[0].replace(",", "")) == pytest.approx(len(encoded.ids) - kept, abs=2)


def test_only_the_nearest_part_of_a_long_cut_is_shown(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunery.models.preview_truncation.MAX_CUT_TOKENS", 4)
    displayed = only(preview_rows([chat(*CHAT)], tokenizer, Encoding(20), "conversation"))
    (cut,) = displayed.cuts
    assert sum(len(group.ids) for group in cut.groups) == 4
    assert kinds(displayed)[-1] == ("mark", f"{displayed.cut_tokens - 4} more tokens")


def test_stage_preview_has_the_first_rows_and_the_template_summary(tokenizer: Any) -> None:
    fields = {"kind": "sft", "data": "a", "model": "b", "epochs": 1, "learning_rate": 0.1, "max_length": 99}
    result = stage_preview(Sft.model_validate(fields), [chat(*CHAT)] * 5, tokenizer)
    assert len(result["records"]) == 3
    assert result["records"][0]["source"] == "a.jsonl"
    assert result["template"] == template_summary(tokenizer)


def test_template_summary_lists_end_token_and_unsupported_features(tokenizer: Any) -> None:
    summary = template_summary(tokenizer)
    assert summary.startswith(
        "a response ends with <|end|>; generation begins after '<|assistant|>'; system messages are rend"
    )
    assert "tool calls are rendered" in summary
    tokenizer.chat_template = GEMMA_LIKE
    summary = template_summary(tokenizer)
    assert "system messages are not supported" in summary
    assert "tool calls are not rendered" in summary
