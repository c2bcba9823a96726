"""The token sequences of a training, read from the store's cache, with one index over all data stages. Also the prompts
of RL trainings, blocks of documents, mixtures of data stages, and the limit `max_unusable`."""

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
    """The concatenation of several tokenised datasets, its parts: one per data stage."""

    def __init__(self, parts: Sequence[TokenizedDataset], labels: Sequence[bool | None] = ()) -> None:
        """labels: for each part, a label that replaces the labels of its rows, or None."""
        self.parts = list(parts)
        part_labels = labels or [None] * len(parts)
        self.row_labels: Integers = np.concatenate(
            [
                part.row_labels if label is None else np.full(len(part), label)
                for part, label in zip(parts, part_labels, strict=True)
            ]
            or [np.zeros(0)]
        ).astype(np.int64)
        """(sequences,) int64, label of the row of each sequence: 1, 0, or -1 without a label."""
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.lengths: Integers = np.concatenate([part.lengths for part in parts] or [np.zeros(0, np.int64)])
        """(sequences,) int64, number of tokens of each sequence."""
        self.stats = TokenStats()
        """Row, sequence and token counts of all parts."""
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
        """Return the part that contains a sequence, and the index of the sequence in that part."""
        part_index = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[part_index], int(index - self._starts[part_index])

    def ids(self, index: int) -> list[int]:
        """Return the token ids of a sequence."""
        part, local_index = self._locate(index)
        return part.ids(local_index)

    def labels(self, index: int) -> list[int]:
        """Return the token ids of a sequence, with -100 for tokens without a loss."""
        part, local_index = self._locate(index)
        return part.labels(local_index)

    def spans(self, index: int) -> list[Span]:
        """Return the spans of tokens that have a loss."""
        part, local_index = self._locate(index)
        return part.spans(local_index)

    def loss_tokens(self, index: int) -> int:
        """Return the number of tokens that have a loss."""
        part, local_index = self._locate(index)
        return part.loss_tokens(local_index)

    def encoded(self, index: int) -> Encoded:
        part, local_index = self._locate(index)
        return Encoded(part.ids(local_index), tuple(part.spans(local_index)), token_types=part.token_types(local_index))

    def row(self, index: int) -> Row:
        """Return the row of a sequence. Only for stage kinds whose RowEncoding keeps rows."""
        part, local_index = self._locate(index)
        return part.row(local_index)

    def row_ids(self) -> npt.NDArray[np.uint64]:
        """Return the id of each sequence's row, (sequences,)."""
        return np.concatenate([part.row_ids for part in self.parts] or [np.zeros(0, np.uint64)])

    def first(self, count: int) -> list[list[int]]:
        """Return the token ids of the first `count` sequences."""
        return [self.ids(index) for index in range(min(count, len(self)))]

    def facts(self) -> dict[str, Any]:
        """Return row, sequence and token counts for the facts of the stage."""
        stats = self.stats
        return {
            **_row_counts(stats),
            "sequences": len(self),
            "unusable_because": dict(stats.unusable.most_common(5)),
            "loss_tokens": stats.loss_tokens,
            "escaped_tokens": stats.escaped_tokens,
            "dropped_reasoning": stats.dropped_reasoning,
        }


class BlockSet:
    """The tokens of a SequenceSet as blocks of `length` tokens: the sequences of each part are concatenated and split,
    and an incomplete last block is dropped. Documents in a block attend to each other, as in GPT-3 (Brown et al. 2020,
    https://arxiv.org/abs/2005.14165, section 2.2)."""

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
    """The prompts of a training that generates responses."""

    def __init__(self, sequences: SequenceSet) -> None:
        self.sequences = sequences
        self.lengths = sequences.lengths
        self.part_sizes, self.part_stats = sequences.part_sizes, sequences.part_stats

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, index: int) -> list[int]:
        return self.sequences.ids(index)

    def row(self, index: int) -> Row:
        """Return the conversation up to the response, as reward functions take it."""
        return as_prompt(self.sequences.row(index))

    def facts(self) -> dict[str, Any]:
        """Return row and prompt counts for the facts of the stage."""
        stats = self.sequences.stats
        too_long = stats.unusable[TOO_LONG]
        return {
            "rows": stats.rows,
            "sequences": len(self),
            "too_long": too_long,
            "unusable": stats.num_unusable - too_long,
        }


class InMemorySequences:
    """Token sequences in memory. Without `labels` every token has a loss."""

    def __init__(self, ids: Sequence[list[int]], labels: Sequence[list[int]] | None = None) -> None:
        self._ids, self._labels = ids, labels or ids
        self.lengths: Integers = np.array([len(sequence) for sequence in ids], np.int64)

    def ids(self, index: int) -> list[int]:
        return self._ids[index]

    def labels(self, index: int) -> list[int]:
        return self._labels[index]


def mixture_of(spec: Training[Any], examples: Examples) -> SequenceMixture | None:
    """Return the mixture of a stage whose `data` maps data stages to weights; None for any other stage."""
    if not isinstance(spec.data, dict):
        return None
    part_sizes = examples.part_sizes
    # A data stage without sequences has weight 0.
    weights = [weight if size else 0.0 for weight, size in zip(spec.data.values(), part_sizes, strict=True)]
    total = sum(weights)
    return SequenceMixture(tuple(part_sizes), tuple(weight / total for weight in weights)) if total else None


def mixture_facts(spec: Training[Any], examples: Examples, order: Integers) -> dict[str, Any]:
    """Return the fact `mixture`: for each data stage of a mixture, its row counts, the number of sequences and tokens
    that are trained on, and its fraction of all tokens. {} without a mixture."""
    if not isinstance(spec.data, dict):
        return {}
    part_sizes, lengths = examples.part_sizes, examples.lengths
    part_indices = np.searchsorted(np.cumsum(part_sizes), order, side="right")
    tokens = np.bincount(part_indices, weights=lengths[order], minlength=len(part_sizes))
    counts = np.bincount(part_indices, minlength=len(part_sizes))
    return {
        "mixture": {
            stage: {
                **_row_counts(stats),
                "sequences": int(count),
                "tokens": int(part_tokens),
                "share": float(part_tokens / tokens.sum()),
            }
            for stage, stats, count, part_tokens in zip(spec.data, examples.part_stats, counts, tokens, strict=True)
        }
    }


def _row_counts(stats: TokenStats) -> dict[str, int]:
    return {"rows": stats.rows, "truncated": stats.truncated, "unusable": stats.num_unusable}


def read_sequences(
    job: Job, tokenizer: Any, encoding: Encoding | None = None
) -> tuple[TrainingSequences, TrainingSequences]:
    """Return the sequences of `data` and `eval_data`. Call on all ranks: rank 0 tokenises rows that are not cached.

    `encoding`: replaces the encoding of the stage, for encodings that depend on the model. Raises StageError if no row
    is usable, or if more rows are unusable than `max_unusable` allows.
    """
    data, eval_data = open_sequences(job, tokenizer, encoding)
    check_sequences(job, data, eval_data)
    return data, eval_data


def read_row_sequences(job: Job, tokenizer: Any, encoding: Encoding | None = None) -> tuple[SequenceSet, SequenceSet]:
    """The same as `read_sequences`, for stage kinds that do not split documents into blocks (all but `pretrain`)."""
    data, eval_data = read_sequences(job, tokenizer, encoding)
    assert isinstance(data, SequenceSet), "the stage kind has no blocks"
    assert isinstance(eval_data, SequenceSet)
    return data, eval_data


def open_sequences(
    job: Job, tokenizer: Any, encoding: Encoding | None = None
) -> tuple[TrainingSequences, TrainingSequences]:
    """The same as `read_sequences`, without the check for unusable rows."""
    encoding, row_encoding = encoding or encoding_of(job.spec), _row_encoding(job)
    data, eval_data = (
        open_rows(job, sources, tokenizer, encoding, row_encoding) for sources in (job.data, job.eval_data)
    )
    if row_encoding.in_blocks:
        return BlockSet(data, job.spec.max_length), BlockSet(eval_data, job.spec.max_length)
    return data, eval_data


def _row_encoding(job: Job) -> RowEncoding:
    row_encoding = row_encoding_of(job.spec)
    assert row_encoding is not None, "every training encodes its rows"
    return row_encoding


def check_sequences(job: Job, data: TrainingSequences, eval_data: TrainingSequences) -> None:
    """Raise StageError if no row is usable, or if more are unusable than `max_unusable` allows. Otherwise rank 0 lists
    the unusable rows in the artifact."""
    for field, sequences in (("data", data), ("eval_data", eval_data)):
        if sequences.parts:
            _check_usable(job, sequences, field)
    if _rank() == 0 and (data.stats.num_unusable or eval_data.stats.num_unusable):
        with (job.out / UNUSABLE).open("w", encoding="utf-8") as file:
            for field, sequences in (("data", data), ("eval_data", eval_data)):
                for row in _unusable_rows(sequences):
                    file.write(json.dumps({**row, "field": field}, ensure_ascii=False) + "\n")


def open_rows(
    job: Job, sources: Sequence[RowSource], tokenizer: Any, encoding: Encoding, row_encoding: RowEncoding
) -> SequenceSet:
    """Open the token sequences of row sources, one part per source. Call on all ranks: rank 0 tokenises rows that are
    not cached, and the others wait for it."""
    cache = TokenCache(job.store / "tokenized", job.store / "leases", *_progress_callbacks(job))
    open_part = cache.open_or_build if _rank() == 0 else cache.wait_for
    parts = []
    for source in sources:
        name = os.path.relpath(source.path, job.store / "artifacts")
        part_encoding = row_encoding if source.label is None else LABELLED_BY_STAGE
        parts.append(open_part(source.path, name, tokenizer, encoding, part_encoding))
    return SequenceSet(parts, [source.label for source in sources])


def _check_usable(job: Job, sequences: TrainingSequences, field: str) -> None:
    stats, spec, row_encoding = sequences.stats, job.spec, _row_encoding(job)
    stage = ", ".join(data_refs(getattr(spec, field)).values())
    if not len(sequences):
        too_short = row_encoding.in_blocks and stats.num_unusable < stats.rows
        raise StageError(
            job.stage,
            f"none of the {stats.rows:,} rows of `{stage}` ({field}) gives a training sequence",
            cause=f"all texts have fewer than max_length ({spec.max_length}) tokens in total"
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
            remedy="repair or filter these rows (`tunery preview` shows rows as the model gets them), change "
            f"{_limits(spec)} if they are too long, or raise `max_unusable`",
        )


def _limits(spec: Training[Any]) -> str:
    """Return the fields that limit the length of a sequence, with their values, for a message."""
    limits = f"max_length (now {spec.max_length})"
    sampling = getattr(spec, "sampling", None)
    return limits if sampling is None else f"{limits} or sampling.max_new_tokens (now {sampling.max_new_tokens})"


def _reasons(unusable: Counter[str]) -> str:
    """Return the most common reasons with their counts, for a message."""
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
    """Return the callbacks of a TokenCache, which emit progress events."""
    log = EventLog(job.events / f"{job.trial or 'stage'}-{job.stage}-0.jsonl", stage=job.stage, trial=job.trial)

    def progress(done: int, total: int) -> None:
        log.write("progress", done=done, total=total, unit="rows", detail="tokenizing", preparing=True)

    def waiting(holder: str) -> None:
        log.write("progress", done=0, total=None, unit="rows", detail=f"waiting: {holder} tokenizes the same rows")

    return progress, waiting


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
