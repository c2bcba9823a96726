"""Rows as a model reads them: trained, masked, special and truncated tokens, in every row format."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
from small_classifiers import write_encoder
from template_tokenizers import tokenizer_of

from tunery.models.encode import Encoding, Truncation, encode_whole
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
    return [(f"{one.kind}{' special' if one.special else ''}", one.text) for one in sequence.segments()]


def test_every_response_of_a_conversation_is_trained_with_its_end_token(tokenizer: Any) -> None:
    shown = only(preview_rows([chat(*CHAT)], tokenizer, Encoding(200), "conversation"))
    assert kinds(shown) == [
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


def test_preview_has_the_tokens_and_the_mask_of_the_training(tokenizer: Any) -> None:
    rows = [chat(*CHAT), chat(*CHAT[:2])]
    for row, (encoded,) in zip(rows, encode_sequences(rows, tokenizer, Encoding(40)), strict=True):
        shown = only(preview_rows([row], tokenizer, Encoding(40), "conversation"))
        assert list(shown.ids) == encoded.ids
        assert sorted(shown.trained) == encoded.loss_indices


def test_last_turn_alone_is_trained_where_the_encoding_says_so(tokenizer: Any) -> None:
    shown = only(preview_rows([chat(*CHAT)], tokenizer, Encoding(200, "last_turn"), "conversation"))
    assert "".join(part for kind, part in kinds(shown) if kind.startswith("trained")) == "北京 🏯.\nYes.<|end|>"


def test_what_truncation_removes_is_shown_behind_what_is_kept(tokenizer: Any) -> None:
    shown = only(preview_rows([chat(*CHAT)], tokenizer, Encoding(20), "conversation"))
    assert shown.truncated
    assert kinds(shown)[:6] == [
        ("masked special", "<|user|>"),
        ("masked", "Capital?"),
        ("masked special", "<|end|><|assistant|>"),
        ("trained", "Paris."),
        ("trained special", "<|end|>"),
        ("mark", "cut off"),
    ]
    assert "".join(part for kind, part in kinds(shown) if kind.startswith("cut")) == (
        "<|user|>And of China? 中国<|end|><|assistant|>北京 🏯.\nYes.<|end|>"
    )


def test_oldest_turns_that_are_cut_off_are_shown_before_what_is_kept(tokenizer: Any) -> None:
    rows = [chat(("system", "Be brief."), *CHAT)]
    (whole,) = encode_whole(rows, tokenizer, Encoding(500))
    encoding = Encoding(len(whole.ids) - 1, truncate="left")
    shown = kinds(only(preview_rows(rows, tokenizer, encoding, "conversation")))
    at = [kind for kind, _ in shown].index("mark")
    assert "".join(part for _, part in shown[:at]) == "<|system|>Be brief.<|end|>"
    assert "".join(part for kind, part in shown if kind.startswith("cut")) == (
        "<|user|>Capital?<|end|><|assistant|>Paris.<|end|>"
    )


def left(
    row: Row, tokenizer: Any, limit: int, input_format: InputFormat = "conversation", **options: Any
) -> PreviewRow:
    (shown,) = preview_rows([row], tokenizer, Encoding(limit, truncate="left"), input_format, **options)
    return shown


def joined(sequence: PreviewSequence) -> str:
    """Its text, with what is cut off in brackets."""
    texts = []
    for kind, group in groupby(sequence.segments(), key=lambda one: one.kind):
        text = "".join(one.text for one in group)
        texts.append({"cut": f"⟪{text}⟫", "mark": f"«{text}»"}.get(kind, text))
    return "".join(texts)


# A digit and a capital letter are a token each.
LONG_RESPONSE = "ABCDEFGHIJKLMNOPQRST"


def test_beginning_of_the_prompt_and_end_of_the_response_are_both_shown_as_cut_off(tokenizer: Any) -> None:
    row = chat(("user", "0123456789"), ("assistant", LONG_RESPONSE))
    (shown,) = left(row, tokenizer, 16).sequences
    assert kinds(shown) == [
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
    assert (shown.cut_tokens, shown.notes) == (18, ())
    assert shown.as_json()["cuts"] == [
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
    row = left(pair("0123456789", LONG_RESPONSE, rejected), tokenizer, 16, input_format)
    prompt = "«cut off»⟪<|user|>01234567⟫«end of what is cut off»89<|end|><|assistant|>"
    assert [joined(one) for one in row.sequences] == [
        f"{prompt}ABCDEFGHIJKL«cut off»⟪MNOPQRST<|end|>⟫",
        f"{prompt}{end}",
    ]


def test_reward_pair_shows_the_cuts_of_both_sides(tokenizer: Any, tmp_path: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(write_encoder(tmp_path, ["bad", "good"]))
    row = left(pair("0123456789", LONG_RESPONSE, "TSRQ"), tokenizer, 16, "reward_pair", model=model)
    end = "⟫«end of what is cut off»"
    assert [joined(one) for one in row.sequences] == [
        f"«cut off»⟪<|user|>01234567{end}89<|end|><|assistant|>ABCDEFGHIJKL«cut off»⟪MNOPQRST<|end|>⟫",
        f"«cut off»⟪<|user|>0{end}123456789<|end|><|assistant|>TSRQ<|end|>",
    ]


def test_text_behind_the_end_token_of_a_pair_is_not_shown_as_cut_off() -> None:
    row = left(pair("0123456789", LONG_RESPONSE, "TSRQ"), tokenizer_of("qwen3"), 40, "pair")
    assert [one.truncated for one in row.sequences] == [True, True]
    assert [joined(one)[-len("<|im_end|>") :] for one in row.sequences] == ["<|im_end|>"] * 2


def test_cuts_of_system_turn_oldest_turns_and_response_are_shown_apart(tokenizer: Any) -> None:
    turns = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", LONG_RESPONSE)]
    (shown,) = left(chat(("system", "0123456789"), *turns), tokenizer, 24).sequences
    assert joined(shown) == (
        "«cut off»⟪<|system|>012345678⟫«end of what is cut off»9<|end|>"
        "«cut off»⟪<|user|>1<|end|><|assistant|>2<|end|>⟫«end of what is cut off»"
        "<|user|>3<|end|><|assistant|>ABCDEFGHIJKLMNOPQR«cut off»⟪ST<|end|>⟫"
    )


def test_of_equal_turns_the_oldest_are_shown_as_cut_off(tokenizer: Any) -> None:
    turns = [("user", "1"), ("assistant", "2")] * 3
    (shown,) = left(chat(("system", "0"), *turns), tokenizer, 16).sequences
    turn = "<|user|>1<|end|><|assistant|>2<|end|>"
    assert joined(shown) == f"<|system|>0<|end|>«cut off»⟪{turn}⟫«end of what is cut off»{turn}{turn}"


def test_first_token_that_stays_is_shown_before_the_cut() -> None:
    row = chat(("user", "0123456789 " * 4), ("assistant", "OK"))
    (shown,) = left(row, tokenizer_of("llama3"), 30).sequences
    assert joined(shown).startswith("<|bos|>«cut off»⟪<|start_header_id|>user<|end_header_id|>")


@pytest.mark.parametrize("limit", [14, 30, 48, 66])
@pytest.mark.parametrize("truncate", ["left", "right", "drop"])
@pytest.mark.parametrize("family", ["scratch", "qwen3", "llama3", "mistral_v3"])
def test_what_is_kept_and_what_is_cut_off_together_are_the_complete_conversation(
    family: str, truncate: Truncation, limit: int
) -> None:
    turns = [("user", "one fox"), ("assistant", "yes"), *CHAT, ("user", "one fox"), ("assistant", "yes " * 12)]
    row, words = chat(*turns), tokenizer_of(family)
    (whole,) = encode_whole([row], words, Encoding(999))
    shown = only(preview_rows([row], words, Encoding(limit, truncate=truncate), "conversation"))
    ids = list(shown.ids)
    for cut in reversed(shown.cuts):
        ids[cut.index : cut.index] = [token for group in cut.groups for token in group.ids]
    assert ids == whole.ids
    assert shown.cut_tokens == len(whole.ids) - len(shown.ids)


def test_cut_whose_position_is_unknown_is_said_and_not_shown() -> None:
    # Llama 2's template puts the system turn into the first user turn, which is another one once turns are left out.
    turns = [("user", "one fox"), ("assistant", "yes"), ("user", "two"), ("assistant", "no")]
    row, words = chat(("system", "Be brief."), *turns), tokenizer_of("llama2")
    (whole,) = encode_whole([row], words, Encoding(999))
    (shown,) = left(row, words, len(whole.ids) - 1).sequences
    assert shown.truncated
    assert shown.cut_tokens == len(whole.ids) - len(shown.ids)
    assert shown.notes == (UNKNOWN_CUT,)
    assert {kind for kind, _ in kinds(shown)}.isdisjoint({"cut", "cut special", "mark"})


def test_parts_of_a_conversation_that_is_split_are_numbered_and_hide_nothing(tokenizer: Any) -> None:
    rows = [chat(*CHAT)]
    (whole,) = encode_whole(rows, tokenizer, Encoding(500))
    encoding = Encoding(len(whole.ids) - 1, truncate="split")
    (row,) = preview_rows(rows, tokenizer, encoding, "conversation")
    assert [one.label for one in row.sequences] == ["part 1 of 2", "part 2 of 2"]
    assert not any(one.cuts for one in row.sequences)


def test_row_that_is_dropped_for_its_length_shows_reason_and_text(tokenizer: Any) -> None:
    shown = only(preview_rows([chat(*CHAT)], tokenizer, Encoding(20, truncate="drop"), "conversation"))
    assert "max_length (20 tokens)" in shown.reason
    assert "".join(part for kind, part in kinds(shown) if kind.startswith("cut")).endswith("Yes.<|end|>")


def test_conversation_that_the_template_rejects_shows_its_reason(tokenizer: Any) -> None:
    tokenizer.chat_template = GEMMA_LIKE
    shown = only(preview_rows([chat(("system", "Be brief."), *CHAT)], tokenizer, Encoding(99), "conversation"))
    assert shown.reason == "the chat template fails: System role not supported"
    assert shown.ids == ()


def test_response_that_is_cut_off_whole_says_that_nothing_is_trained(tokenizer: Any) -> None:
    rows = [chat(*CHAT[:2])]
    (whole,) = encode_whole(rows, tokenizer, Encoding(500))
    shown = only(preview_rows(rows, tokenizer, Encoding(whole.response[0]), "conversation"))
    assert "no response is left to train on" in shown.reason


def test_special_token_in_a_rows_own_text_is_not_special(tokenizer: Any) -> None:
    rows = [chat(("user", "a <|end|> b"), ("assistant", "c"))]
    shown = only(preview_rows(rows, tokenizer, Encoding(99), "conversation"))
    assert ("masked", "a <|end|> b") in kinds(shown)
    assert shown.notes == ("a special token in the row's own text is encoded as ordinary text",)


def test_both_responses_of_a_pair_end_with_their_end_token(tokenizer: Any) -> None:
    (row,) = preview_rows([pair("Capital?", "Paris.", "Fox.")], tokenizer, Encoding(99), "pair")
    assert [one.label for one in row.sequences] == ["chosen", "rejected"]
    assert [kinds(one)[-2:] for one in row.sequences] == [
        [("trained", "Paris."), ("trained special", "<|end|>")],
        [("trained", "Fox."), ("trained special", "<|end|>")],
    ]


def test_pair_that_is_the_same_when_cut_is_not_used(tokenizer: Any) -> None:
    long = "The quick brown fox answers the user briefly."
    (row,) = preview_rows([pair("?", f"{long} Yes", f"{long} No")], tokenizer, Encoding(8), "pair")
    assert row.reason == "both responses are the same once they are cut"


def test_row_without_a_second_response_is_no_pair(tokenizer: Any) -> None:
    (row,) = preview_rows([chat(*CHAT)], tokenizer, Encoding(99), "pair")
    assert (row.reason, row.sequences) == ("it is no preference pair", ())


def test_rated_responses_say_which_is_desirable(tokenizer: Any) -> None:
    rows = [chat(*CHAT[:2], label=False), pair("Capital?", "Paris.", "Fox."), chat(*CHAT[:2])]
    shown = preview_rows(rows, tokenizer, Encoding(99), "rated")
    labels = [[one.label for one in row.sequences] for row in shown]
    assert labels == [["undesirable"], ["desirable", "undesirable"], []]
    assert shown[2].reason == "it has no rating"


def test_prompt_ends_where_generation_begins_and_has_no_mask(tokenizer: Any) -> None:
    shown = only(preview_rows([chat(*CHAT[:2])], tokenizer, Encoding(99), "prompt"))
    assert kinds(shown) == [
        ("input special", "<|user|>"),
        ("input", "Capital?"),
        ("input special", "<|end|><|assistant|>"),
        ("mark", "generation begins here"),
    ]


def test_prompt_that_leaves_no_room_for_a_response_says_so(tokenizer: Any) -> None:
    shown = only(preview_rows([chat(*CHAT)], tokenizer, Encoding(9), "prompt"))
    assert "max_length leaves room for 9" in shown.reason


def test_documents_show_their_end_tokens_and_where_blocks_begin(tokenizer: Any) -> None:
    rows = [text("Paris. Paris."), text("The quick brown fox")]
    lengths = [len(item.ids) for item in encode_whole(rows, tokenizer, Encoding(5))]
    shown = [only([row]) for row in preview_rows(rows, tokenizer, Encoding(5), "documents")]
    begins = [index - offset for offset, one in zip((0, lengths[0]), shown, strict=True) for index, _ in one.marks]
    assert [text for one in shown for _, text in one.marks] == [
        f"block {number} begins" for number in range(1, 2 + (sum(lengths) - 1) // 5)
    ]
    assert begins
    for one, start in zip(shown, (0, lengths[0]), strict=True):
        assert all((start + index) % 5 == 0 for index, _ in one.marks)
        assert {index for index, _ in one.marks} == set(range(len(one.ids))) - one.trained
        assert (one.groups[-1].text, one.groups[-1].special) == ("<|end|>", True)


def test_blocks_of_a_later_document_go_on_from_those_before_it(tokenizer: Any) -> None:
    rows = [text("Paris. Paris."), text("The quick brown fox")]
    both = preview_rows(rows, tokenizer, Encoding(5), "documents")
    assert preview_rows(rows, tokenizer, Encoding(5), "documents", skip=1) == both[1:]


def test_ifd_scores_the_response_after_the_prompt_and_without_it(tokenizer: Any) -> None:
    (row,) = preview_rows([chat(*CHAT[:2])], tokenizer, Encoding(99), "ifd")
    assert [one.label for one in row.sequences] == ["after the prompt", "without the prompt"]
    assert kinds(row.sequences[1]) == [
        ("masked special", "<|assistant|>"),
        ("trained", "Paris."),
        ("trained special", "<|end|>"),
    ]


def test_classifier_without_a_template_gets_question_and_response_as_a_pair_of_texts(tmp_path: Any) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = write_encoder(tmp_path, ["bad", "good"])
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)
    row = chat(("user", "why how"), ("assistant", "because so"))
    shown = only(preview_rows([row], words, Encoding(32), "classifier", model=model))
    assert [one.text.strip() for one in shown.segments()] == ["[CLS]", "why how", "[SEP]", "because so", "[SEP]"]
    assert {one.kind for one in shown.segments()} == {"input"}


def test_cut_of_one_text_of_a_pair_is_shown_and_of_both_is_said(tmp_path: Any) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = write_encoder(tmp_path, ["bad", "good"])
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)
    long = chat(("user", "why how"), ("assistant", "because so because so because"))
    (one,) = left(long, words, 8, "classifier", model=model).sequences
    assert [(part.kind, part.text.strip()) for part in one.segments()][-4:] == [
        ("mark", "cut off"),
        ("cut", "so because"),
        ("mark", "end of what is cut off"),
        ("input", "[SEP]"),
    ]
    (both,) = left(long, words, 6, "classifier", model=model).sequences
    assert (both.cuts, both.cut_tokens, both.notes) == ((), 4, (UNKNOWN_CUT,))


@pytest.mark.parametrize("content", [CHINESE, "plain words", " leading", "tab\tand\nline", "e\u0301 \u202e x", ""])
def test_texts_of_token_groups_are_the_text_of_the_whole(tokenizer: Any, content: str) -> None:
    ids = tokenizer(content, add_special_tokens=False)["input_ids"]
    groups = list(token_groups(ids, tokenizer))
    assert "".join(group.text for group in groups) == content
    assert [token for group in groups for token in group.ids] == ids


def test_character_of_several_tokens_is_shown_whole(tokenizer: Any) -> None:
    (group,) = token_groups(tokenizer("京")["input_ids"], tokenizer)
    assert (group.text, len(group.ids)) == ("京", 3)


def test_tokenizer_that_drops_the_first_space_keeps_those_between_words() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # As Llama 2's: words begin with ▁, and the decoder drops the first one.
    model = models.WordLevel({"<unk>": 0, "▁one": 1, "▁two": 2}, unk_token="<unk>")
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    groups = list(token_groups([1, 2, 1], PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")))
    assert [group.text for group in groups] == ["one", " two", " one"]


def test_record_leaves_out_the_middle_of_a_long_sequence(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunery.models.preview.MAX_RECORD_TOKENS", 8)
    ((record,),) = [preview_records([chat(*CHAT)], tokenizer, Encoding(200))]
    (sequence,) = record["sequences"]
    (mark,) = [shown for kind, shown, _ in sequence["segments"] if kind == "mark"]
    assert mark.endswith("tokens are not shown here")
    assert sequence["num_tokens"] > 8
    assert sequence["segments"][-1] == ["trained", "<|end|>", 1]


def test_long_document_is_not_decoded_whole_for_a_record(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunery.models.preview.MAX_RECORD_TOKENS", 40)
    row = text("The quick brown fox. " * 5_000)
    (encoded,) = encode_whole([row], tokenizer, Encoding(16))
    decoded = 0
    decode = type(tokenizer).decode

    def counted(self: Any, ids: Any, **options: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return decode(self, ids, **options)

    monkeypatch.setattr(type(tokenizer), "decode", counted)
    (record,) = preview_records([row], tokenizer, Encoding(16), input_format="documents")
    segments = record["sequences"][0]["segments"]
    assert 0 < decoded < 200
    assert segments[0] == ["mark", "block 1 begins", 0]
    (omitted,) = [shown for kind, shown, _ in segments if kind == "mark" and "not shown" in shown]
    shown = "".join(shown for kind, shown, _ in segments if kind != "mark")
    kept = len(tokenizer(shown.removesuffix("<|end|>"))["input_ids"])
    assert int(omitted.split()[0].replace(",", "")) == pytest.approx(len(encoded.ids) - kept, abs=2)


def test_only_the_nearest_part_of_a_long_cut_is_shown(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunery.models.preview_truncation.MAX_CUT_TOKENS", 4)
    shown = only(preview_rows([chat(*CHAT)], tokenizer, Encoding(20), "conversation"))
    (cut,) = shown.cuts
    assert sum(len(group.ids) for group in cut.groups) == 4
    assert kinds(shown)[-1] == ("mark", f"{shown.cut_tokens - 4} more tokens")


def test_training_logs_its_first_rows_and_what_the_template_does(tokenizer: Any) -> None:
    fields = {"kind": "sft", "data": "a", "model": "b", "epochs": 1, "learning_rate": 0.1, "max_length": 99}
    told = stage_preview(Sft.model_validate(fields), [chat(*CHAT)] * 5, tokenizer)
    assert len(told["records"]) == 3
    assert told["records"][0]["source"] == "a.jsonl"
    assert told["template"] == template_summary(tokenizer)


def test_template_summary_names_end_token_and_what_is_not_supported(tokenizer: Any) -> None:
    own = template_summary(tokenizer)
    assert own.startswith(
        "a response ends with <|end|>; generation begins after '<|assistant|>'; system turns are rend"
    )
    assert "tool calls are rendered" in own
    tokenizer.chat_template = GEMMA_LIKE
    summary = template_summary(tokenizer)
    assert "system turns are not supported" in summary
    assert "tool calls are not rendered" in summary
