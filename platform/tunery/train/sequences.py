"""The training sequences of `pretrain` and `sft`: blocks of texts, or conversations whose answers count."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunery.errors import StageError
from tunery.models.encode import Encoded, blocks, encode
from tunery.spec import Pretrain, Sft
from tunery.store.rows import CONTENT, Row
from tunery.train.job import Job, rows_of

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Tokens:
    """Training sequences."""

    ids: list[list[int]]
    labels: list[list[int]]
    rows: int
    truncated: int
    unusable: int
    """Rows without any token to learn from (an empty answer, or one cut off whole)."""

    def dataset(self) -> Dataset:
        from datasets import Dataset

        return Dataset.from_dict({"input_ids": self.ids, "labels": self.labels})

    def counted(self) -> dict[str, Any]:
        """Facts: what became of the rows."""
        return {
            "rows": self.rows,
            "sequences": len(self.ids),
            "truncated": self.truncated,
            "unusable": self.unusable,
        }


def read_sequences(job: Job, tokenizer: Any) -> tuple[Tokens, Tokens]:
    """Those that are learned from, and those that are measured. Raises StageError when no row can be learned from, or
    none of eval_data measured."""
    spec = job.spec
    assert isinstance(spec, Pretrain | Sft)
    data = _tokens(spec, rows_of(job.rows, CONTENT), tokenizer)
    if not data.ids:
        raise StageError(
            job.stage,
            f"none of {data.rows} rows gives a training sequence",
            cause="every answer is empty, or cut off because the question alone fills max_length"
            if isinstance(spec, Sft)
            else f"all texts together have fewer than max_length ({spec.max_length}) tokens",
            remedy=f"change max_length (now {spec.max_length}), or give other rows",
        )
    measured = _tokens(spec, rows_of(job.eval_rows, CONTENT), tokenizer)
    if job.eval_rows and not measured.ids:
        raise StageError(
            job.stage,
            f"none of the {measured.rows} rows of `{spec.eval_data}` can be evaluated",
            cause=f"they are shorter than a block of max_length ({spec.max_length}) tokens"
            if isinstance(spec, Pretrain)
            else "every answer is empty, or cut off because the question alone fills max_length",
            remedy="change max_length, or give other rows as eval_data",
        )
    return data, measured


def _tokens(spec: Pretrain | Sft, rows: Iterable[Row], tokenizer: Any) -> Tokens:
    encoded: list[Encoded] = []
    pending: list[Row] = []
    # Texts are cut into blocks anyway: only conversations are cut to length one by one.
    longest = 10**9 if isinstance(spec, Pretrain) else spec.max_length
    for row in rows:
        pending.append(row)
        if len(pending) == 1000:
            encoded += encode(pending, tokenizer, longest, "all_turns")
            pending = []
    encoded += encode(pending, tokenizer, longest, "all_turns")
    if isinstance(spec, Pretrain):
        ids = list(blocks(encoded, spec.max_length))
        return Tokens(ids, ids, len(encoded), 0, 0)
    usable = [item for item in encoded if item.num_loss_tokens]
    return Tokens(
        [item.ids for item in usable],
        [item.labels for item in usable],
        len(encoded),
        sum(item.truncated for item in encoded),
        len(encoded) - len(usable),
    )
