"""The row encoding of each stage kind, which converts its rows to token sequences. The registry of stage kinds refers
to these by name."""

from __future__ import annotations

from typing import Any

from tunery.models.classifier_inputs import NO_LABEL, encode_labelled, encode_reward_pairs, encode_unlabelled
from tunery.models.encode import NO_LIMIT, Encoding
from tunery.models.encode_preferences import encode_pairs, encode_rated
from tunery.models.encode_rows import RowEncoding, encode_conversations, encode_documents
from tunery.models.prompts import COLUMNS as PROMPT_COLUMNS
from tunery.models.prompts import encode_prompt_rows
from tunery.spec import STAGE_KINDS
from tunery.spec.plugins import load_object
from tunery.store.rows import CONTENT

DOCUMENTS = RowEncoding(
    encode_documents, tuple(CONTENT), "a text or a conversation", input_format="documents", in_blocks=True
)
CONVERSATIONS = RowEncoding(
    encode_conversations, tuple(CONTENT), "a conversation with a response", input_format="conversation"
)
PREFERENCE_PAIRS = RowEncoding(
    encode_pairs,
    (*CONTENT, "rejected"),
    "a preference pair (`chosen` and `rejected`, docs/data.md)",
    input_format="pair",
)
RATED_RESPONSES = RowEncoding(
    encode_rated,
    (*CONTENT, "rejected", "label"),
    "a rated response (`label`) or a preference pair (docs/data.md)",
    input_format="rated",
)
REWARD_PAIRS = RowEncoding(
    encode_reward_pairs,
    (*CONTENT, "rejected"),
    "a preference pair (`chosen` and `rejected`, docs/data.md) whose responses differ within max_length",
    input_format="reward_pair",
)
LABELLED_ROWS = RowEncoding(
    encode_labelled, (*CONTENT, "label"), "a text or a conversation with a label", input_format="classifier"
)
LABELLED_BY_STAGE = RowEncoding(
    encode_unlabelled, tuple(CONTENT), "a text or a conversation", input_format="classifier"
)
"""Encoding of rows whose data stage determines their label (`{good: .., bad: ..}`)."""
PROMPTS = RowEncoding(
    encode_prompt_rows, PROMPT_COLUMNS, "a conversation with a prompt", input_format="prompt", keeps_rows=True
)
NOT_COUNTED = frozenset({NO_LABEL})
"""Reasons that do not count towards `max_unusable`: a dataset may be labelled partially."""


def row_encoding_of(stage: Any) -> RowEncoding | None:
    """Return the encoding of the rows in `data` of a stage (tunery.spec); None if its kind has none."""
    reference = STAGE_KINDS[stage.kind].row_encoding
    row_encoding: RowEncoding | None = load_object(reference) if reference else None
    return row_encoding


def encoding_of(stage: Any) -> Encoding:
    """Return the Encoding of the rows of a stage. Documents are not truncated, since they are split into blocks, and
    prompts are not truncated, since a truncated question is useless."""
    row_encoding = row_encoding_of(stage)
    if row_encoding is not None and row_encoding.in_blocks:
        return Encoding(NO_LIMIT, "all_tokens")
    if hasattr(stage, "sampling"):
        return Encoding(stage.max_length - stage.sampling.max_new_tokens, "last_turn", "drop")
    return Encoding(
        stage.max_length,
        getattr(stage, "train_on", "last_turn"),
        getattr(stage, "truncate", "left"),
        getattr(stage, "empty_thinking", "mask"),
    )
