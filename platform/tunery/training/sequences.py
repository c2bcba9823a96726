"""The training sequences of a stage: tokenised rows from the store's cache, with one index over all data stages."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tunery.errors import StageError
from tunery.events.event_log import EventLog
from tunery.models.encode import Encoded, Encoding, Span, as_prompt
from tunery.models.encode_rows import RowEncoding
from tunery.models.prompts import TOO_LONG
from tunery.models.row_encodings import LABELLED_BY_STAGE, NOT_COUNTED, encoding_of, row_encoding_of
from tunery.models.token_cache import TokenCache
from tunery.models.tokenized_dataset import Integers, TokenizedDataset, TokenStats
from tunery.spec import Training
from tunery.spec.trainings import data_refs
from tunery.store.rows import Row
from tunery.training.batches import SequenceMixture
from tunery.training.job import Examples, Job, RowSource

UNUSABLE = "unusable.jsonl"
"""File in a model's artifact that lists the rows that were not trained on, with the reason."""


class SequenceSet:
    """The concatenation of several tokenised datasets."""

    def __init__(self, parts: Sequence[TokenizedDataset], labels: Sequence[bool | None] = ()) -> None:
        """labels: for each dataset, a label that replaces the labels of its rows, or None."""
        self.parts = list(parts)
        part_labels = labels or [None] * len(parts)
        self.row_labels: Integers = np.concatenate(
            [
                part.row_labels if label is None else np.full(len(part), label)
                for part, label in zip(parts, part_labels, strict=True)
            ]
            or [np.zeros(0)]
        ).astype(np.int64)
        """(sequences,) label of the row of each sequence: 1, 0, or -1 without a label."""
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.lengths: Integers = np.concatenate([part.lengths for part in parts] or [np.zeros(0, np.int64)])
        """(sequences,) number of tokens of each."""
        self.stats = TokenStats()
        for part in parts:
            self.stats.add(part.stats)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def part_sizes(self) -> list[int]:
        """Number of sequences of each data stage."""
        return [len(part) for part in self.parts]

    @property
    def part_stats(self) -> list[TokenStats]:
        return [part.stats for part in self.parts]

    def _locate(self, index: int) -> tuple[TokenizedDataset, int]:
        """Return the dataset of a sequence, and its index in that dataset."""
        part_index = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[part_index], int(index - self._starts[part_index])

    def ids(self, index: int) -> list[int]:
        part, local_index = self._locate(index)
        return part.ids(local_index)

    def labels(self, index: int) -> list[int]:
        """`ids`, with -100 for tokens without a loss."""
        part, local_index = self._locate(index)
        return part.labels(local_index)

    def spans(self, index: int) -> list[Span]:
        part, local_index = self._locate(index)
        return part.spans(local_index)

    def loss_tokens(self, index: int) -> int:
        part, local_index = self._locate(index)
        return part.loss_tokens(local_index)

    def encoded(self, index: int) -> Encoded:
        part, local_index = self._locate(index)
        return Encoded(part.ids(local_index), tuple(part.spans(local_index)), token_types=part.token_types(local_index))

    def row(self, index: int) -> Row:
        """The row of a sequence, for stage kinds that keep their rows."""
        part, local_index = self._locate(index)
        return part.row(local_index)

    def row_ids(self) -> npt.NDArray[np.uint64]:
        """(sequences,) ids of the rows."""
        return np.concatenate([part.row_ids for part in self.parts] or [np.zeros(0, np.uint64)])

    def first(self, count: int) -> list[list[int]]:
        """The ids of the first sequences."""
        return [self.ids(index) for index in range(min(count, len(self)))]

    def facts(self) -> dict[str, Any]:
        """Row, sequence and token counts for the facts."""
        stats = self.stats
        reasons = dict(stats.unusable.most_common(5))
        return {
            **_row_counts(stats),
            "sequences": len(self),
            "unusable_because": reasons,
            "loss_tokens": stats.loss_tokens,
            "escaped_tokens": stats.escaped_tokens,
            "dropped_reasoning": stats.dropped_reasoning,
        }


class BlockSet:
    """The tokens of each part of a SequenceSet, concatenated and split into blocks of `length`; an incomplete last
    block is dropped. Documents in a block attend to each other, as in GPT-3 (https://arxiv.org/abs/2005.14165,
    section 2.2)."""

    def __init__(self, sequences: SequenceSet, length: int) -> None:
        self._sequences, self._length = sequences, length
        self.part_sizes = [int(part.tokens.size) // length for part in sequences.parts]
        self._starts = np.cumsum([0, *self.part_sizes])
        self.lengths: Integers = np.full(int(self._starts[-1]), length, np.int64)
        self.stats, self.part_stats = sequences.stats, sequences.part_stats
        self.parts = sequences.parts

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, index: int) -> list[int]:
        part_index = int(np.searchsorted(self._starts, index, side="right")) - 1
        start = int(index - self._starts[part_index]) * self._length
        ids: list[int] = self._sequences.parts[part_index].tokens[start : start + self._length].tolist()
        return ids

    def labels(self, index: int) -> list[int]:
        return self.ids(index)

    def loss_tokens(self, index: int) -> int:
        return self._length - 1

    def first(self, count: int) -> list[list[int]]:
        return [self.ids(index) for index in range(min(count, len(self)))]

    def facts(self) -> dict[str, Any]:
        loss_tokens = len(self) * (self._length - 1)
        return {**self._sequences.facts(), "sequences": len(self), "truncated": 0, "loss_tokens": loss_tokens}


TrainingSequences = SequenceSet | BlockSet


class PromptSet:
    """Prompts that a training generates responses to."""

    def __init__(self, sequences: SequenceSet) -> None:
        self.sequences = sequences
        self.lengths = sequences.lengths
        self.part_sizes, self.part_stats = sequences.part_sizes, sequences.part_stats

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, index: int) -> list[int]:
        return self.sequences.ids(index)

    def row(self, index: int) -> Row:
        """The input of a reward function: the conversation up to the response."""
        return as_prompt(self.sequences.row(index))

    def facts(self) -> dict[str, Any]:
        """Row, sequence and token counts for the facts."""
        stats = self.sequences.stats
        too_long = stats.unusable[TOO_LONG]
        return {
            "rows": stats.rows,
            "sequences": len(self),
            "too_long": too_long,
            "unusable": stats.num_unusable - too_long,
        }


class InMemorySequences:
    """Sequences in memory. Without `labels` every token has a loss."""

    def __init__(self, ids: Sequence[list[int]], labels: Sequence[list[int]] | None = None) -> None:
        self._ids, self._labels = ids, labels or ids
        self.lengths: Integers = np.array([len(sequence) for sequence in ids], np.int64)

    def ids(self, index: int) -> list[int]:
        return self._ids[index]

    def labels(self, index: int) -> list[int]:
        return self._labels[index]


def mixture_of(spec: Training[Any], examples: Examples) -> SequenceMixture | None:
    """Return the mixture of a stage whose `data` maps data stages to weights, else None."""
    if not isinstance(spec.data, dict):
        return None
    part_sizes = examples.part_sizes
    # A data stage without sequences has weight 0.
    weights = [weight if size else 0.0 for weight, size in zip(spec.data.values(), part_sizes, strict=True)]
    total = sum(weights)
    return SequenceMixture(tuple(part_sizes), tuple(weight / total for weight in weights)) if total else None


def mixture_facts(spec: Training[Any], examples: Examples, order: Integers) -> dict[str, Any]:
    """Return, for each data stage of a mixture, its row counts, the sequences and tokens that are trained on, and its
    fraction of all tokens."""
    if not isinstance(spec.data, dict):
        return {}
    part_sizes, lengths = examples.part_sizes, examples.lengths
    parts = np.searchsorted(np.cumsum(part_sizes), order, side="right")
    tokens = np.bincount(parts, weights=lengths[order], minlength=len(part_sizes))
    counts = np.bincount(parts, minlength=len(part_sizes))
    return {
        "mixture": {
            stage: {
                **_row_counts(part),
                "sequences": int(count),
                "tokens": int(part_tokens),
                "share": float(part_tokens / tokens.sum()),
            }
            for stage, part, count, part_tokens in zip(spec.data, examples.part_stats, counts, tokens, strict=True)
        }
    }


def _row_counts(stats: TokenStats) -> dict[str, int]:
    return {"rows": stats.rows, "truncated": stats.truncated, "unusable": stats.num_unusable}


def read_sequences(
    job: Job, tokenizer: Any, encoding: Encoding | None = None
) -> tuple[TrainingSequences, TrainingSequences]:
    """Return the sequences of `data` and `eval_data`. Call on all ranks: rank 0 tokenises what is not cached.

    `encoding`: replaces the stage's encoding if it depends on the model. Raises StageError if more rows are unusable
    than `max_unusable` allows, or if no row is usable.
    """
    data, eval_data = open_sequences(job, tokenizer, encoding)
    check_sequences(job, data, eval_data)
    return data, eval_data


def read_row_sequences(job: Job, tokenizer: Any, encoding: Encoding | None = None) -> tuple[SequenceSet, SequenceSet]:
    """The same for stage kinds without blocks."""
    data, eval_data = read_sequences(job, tokenizer, encoding)
    assert isinstance(data, SequenceSet), "the stage kind has no blocks"
    assert isinstance(eval_data, SequenceSet)
    return data, eval_data


def open_sequences(
    job: Job, tokenizer: Any, encoding: Encoding | None = None
) -> tuple[TrainingSequences, TrainingSequences]:
    """The same as `read_sequences`, without checking for unusable rows."""
    encoding, row_encoding = encoding or encoding_of(job.spec), _row_encoding(job)
    data, eval_data = (open_rows(job, rows, tokenizer, encoding, row_encoding) for rows in (job.data, job.eval_data))
    if row_encoding.in_blocks:
        return BlockSet(data, job.spec.max_length), BlockSet(eval_data, job.spec.max_length)
    return data, eval_data


def _row_encoding(job: Job) -> RowEncoding:
    row_encoding = row_encoding_of(job.spec)
    assert row_encoding is not None, "every training encodes its rows"
    return row_encoding


def check_sequences(job: Job, data: TrainingSequences, eval_data: TrainingSequences) -> None:
    """Raise StageError as `read_sequences` does; rank 0 writes the unusable rows to the artifact."""
    for field, sequences in (("data", data), ("eval_data", eval_data)):
        if sequences.parts:
            _check_usable(job, sequences, field)
    if _rank() == 0 and (data.stats.num_unusable or eval_data.stats.num_unusable):
        with (job.out / UNUSABLE).open("w", encoding="utf-8") as file:
            for field, sequences in (("data", data), ("eval_data", eval_data)):
                for row in _unusable_rows(sequences):
                    file.write(json.dumps({**row, "field": field}, ensure_ascii=False) + "\n")


def open_rows(
    job: Job, rows: Sequence[RowSource], tokenizer: Any, encoding: Encoding, kind: RowEncoding
) -> SequenceSet:
    """Open the tokenised sequences of `rows`. Call on all ranks."""
    cache = TokenCache(job.store / "tokenized", job.store / "leases", *_progress_callbacks(job))
    parts = []
    for source in rows:
        name = os.path.relpath(source.path, job.store / "artifacts")
        get = cache.open_or_build if _rank() == 0 else cache.wait_for
        row_encoding = kind if source.label is None else LABELLED_BY_STAGE
        parts.append(get(source.path, name, tokenizer, encoding, row_encoding))
    return SequenceSet(parts, [source.label for source in rows])


def _check_usable(job: Job, sequences: TrainingSequences, field: str) -> None:
    stats, spec, row_encoding = sequences.stats, job.spec, _row_encoding(job)
    stage = ", ".join(data_refs(getattr(spec, field)).values())
    if not len(sequences):
        too_short = row_encoding.in_blocks and stats.num_unusable < stats.rows
        raise StageError(
            job.stage,
            f"none of the {stats.rows:,} rows of `{stage}` ({field}) gives a training sequence",
            cause=f"all texts together have fewer than max_length ({spec.max_length}) tokens"
            if too_short
            else _reasons(stats.unusable),
            remedy=f"give more rows, or lower max_length (now {spec.max_length})"
            if too_short
            else f"give rows of which each is {row_encoding.what}, or change {_limits(spec)}",
        )
    unusable = Counter({reason: count for reason, count in stats.unusable.items() if reason not in NOT_COUNTED})
    count, rows = unusable.total(), stats.rows
    if count > spec.max_unusable * rows:
        raise StageError(
            job.stage,
            f"{count:,} of {rows:,} rows of `{stage}` ({field}) can't be trained on: {count / rows:.0%}, "
            f"and max_unusable is {spec.max_unusable:g}",
            cause=_reasons(unusable) + _example(sequences),
            remedy="repair or filter these rows (`tunery preview` shows rows as they are trained), change "
            f"{_limits(spec)} where they are too long, or allow more with `max_unusable`",
        )


def _limits(spec: Training[Any]) -> str:
    """Name the fields that limit the length of a sequence, with their values."""
    limits = f"max_length (now {spec.max_length})"
    sampling = getattr(spec, "sampling", None)
    return limits if sampling is None else f"{limits} or sampling.max_new_tokens (now {sampling.max_new_tokens})"


def _reasons(unusable: Counter[str]) -> str:
    return "; ".join(
        f"{count:,} {'row' if count == 1 else 'rows'}: {reason}" for reason, count in unusable.most_common(3)
    )


def _example(sequences: TrainingSequences) -> str:
    first = next(_unusable_rows(sequences), None)
    return "" if first is None else f"; the first of them: {first['source']}:{first['line']}"


def _unusable_rows(sequences: TrainingSequences) -> Iterator[dict[str, Any]]:
    for part in sequences.parts:
        yield from part.unusable_rows()


def _progress_callbacks(job: Job) -> tuple[Callable[[int, int], None], Callable[[str], None]]:
    log = EventLog(job.events / f"{job.trial or 'stage'}-{job.stage}-0.jsonl", stage=job.stage, trial=job.trial)

    def progress(done: int, total: int) -> None:
        log.write("progress", done=done, total=total, unit="rows", detail="tokenizing", preparing=True)

    def waiting(holder: str) -> None:
        log.write("progress", done=0, total=None, unit="rows", detail=f"waiting: {holder} tokenizes the same rows")

    return progress, waiting


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
