"""The interface of row encodings, which convert the rows of a stage kind to token sequences, and the encodings of texts
and conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from tunery.models.encode import Encoded, Encoding, encode_untruncated
from tunery.models.truncation import encode_sequences
from tunery.store.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class TokenizedRow:
    """The token sequences of a row."""

    sequences: list[Encoded]
    labels: list[int] = field(default_factory=list)
    """Label of each sequence, 1 or 0; [] if the stage kind has no labels."""
    unusable: str = ""
    """Why the row is not used; "" if it is."""


EncodeRows = Callable[[Sequence[Row], "PreTrainedTokenizerBase", Encoding], Iterator[TokenizedRow]]
"""Yields one TokenizedRow per row. A module-level function, since it is pickled by name."""


InputFormat = Literal[
    "documents", "conversation", "pair", "rated", "prompt", "scored", "all_tokens", "ifd", "classifier", "reward_pair"
]
"""How a row is converted to sequences.

documents: concatenated texts, split into blocks of `max_length`
conversation: a conversation as in `sft`
pair: both responses of a preference pair, each after the prompt
rated: a rated response, or both responses of a pair
prompt: the prompt up to the start of generation
scored: a row whose last response is scored
all_tokens: a row whose tokens are all scored
ifd: the last response, once after the prompt and once without it
classifier: the input of a sequence classifier or an embedding model
reward_pair: the classifier inputs of both responses of a pair
"""


@dataclass(frozen=True)
class RowEncoding:
    """How a stage kind encodes rows."""

    encode_rows: EncodeRows
    columns: tuple[str, ...]
    """Columns of the rows that it reads."""
    what: str
    """Description of a usable row, for messages."""
    input_format: InputFormat
    """How a preview shows the rows (models/preview.py)."""
    in_blocks: bool = False
    """Whether the sequences are concatenated and split into blocks of `max_length`."""
    keeps_rows: bool = False
    """Whether the rows themselves are stored (`TokenizedDataset.row`); each row must have one sequence then."""


def encode_conversations(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> Iterator[TokenizedRow]:
    """Encode texts and conversations for `sft`."""
    for sequences in encode_sequences(rows, tokenizer, encoding):
        reason = next((item.rejected for item in sequences if item.rejected), "")
        if not reason and not any(item.num_loss_tokens for item in sequences):
            reason = "no response is left to train on"
        yield TokenizedRow([item for item in sequences if item.num_loss_tokens] or sequences, unusable=reason)


def encode_documents(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> Iterator[TokenizedRow]:
    """Encode texts and conversations for `pretrain`, untruncated and with a loss on all tokens."""
    for item in encode_untruncated(rows, tokenizer, encoding):
        yield TokenizedRow([item], unusable=item.rejected or ("" if item.ids else "it has no token"))
