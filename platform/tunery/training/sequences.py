"""The training sequences of a stage: tokenised rows from the store's cache, by one index over all its data stages."""

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
from tunery.models.classifier_inputs import NO_LABEL, encode_labelled, encode_reward_pairs, encode_unlabelled
from tunery.models.encode import Encoded, Encoding, Span, as_prompt, encoding_of
from tunery.models.encode_preferences import encode_pairs, encode_rated
from tunery.models.prompts import COLUMNS as PROMPT_COLUMNS
from tunery.models.prompts import TOO_LONG, encode_prompt_rows
from tunery.models.tokenized_dataset import (
    Integers,
    RowEncoding,
    TokenCache,
    TokenizedDataset,
    TokenStats,
    encode_conversations,
    encode_documents,
)
from tunery.spec import Pretrain, Training
from tunery.spec.trainings import data_refs
from tunery.store.rows import CONTENT, Row
from tunery.training.batches import SequenceMixture
from tunery.training.job import Examples, Job, RowSource

UNUSABLE = "unusable.jsonl"
"""In a model's artifact: the rows that were not trained on, and why."""


class SequenceSet:
    """Sequences of several tokenised datasets, one after the other."""

    def __init__(self, parts: Sequence[TokenizedDataset], labels: Sequence[bool | None] = ()) -> None:
        """labels: of all rows of a dataset, instead of their own."""
        self.parts = list(parts)
        given = labels or [None] * len(parts)
        self.row_labels: Integers = np.concatenate(
            [
                part.row_labels if label is None else np.full(len(part), label)
                for part, label in zip(parts, given, strict=True)
            ]
            or [np.zeros(0)]
        ).astype(np.int64)
        """(sequences,) the label of the row that each comes from: 1, 0, or -1 where it has none."""
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.lengths: Integers = np.concatenate([part.lengths for part in parts] or [np.zeros(0, np.int64)])
        """(sequences,) tokens of each."""
        self.stats = TokenStats()
        for part in parts:
            self.stats.add(part.stats)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def part_sizes(self) -> list[int]:
        """Sequences of each data stage."""
        return [len(part) for part in self.parts]

    @property
    def part_stats(self) -> list[TokenStats]:
        return [part.stats for part in self.parts]

    def _part(self, index: int) -> tuple[TokenizedDataset, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[number], int(index - self._starts[number])

    def ids(self, index: int) -> list[int]:
        part, place = self._part(index)
        return part.ids(place)

    def labels(self, index: int) -> list[int]:
        """`ids` with -100 where no loss counts."""
        part, place = self._part(index)
        return part.labels(place)

    def spans(self, index: int) -> list[Span]:
        part, place = self._part(index)
        return part.spans(place)

    def loss_tokens(self, index: int) -> int:
        part, place = self._part(index)
        return part.loss_tokens(place)

    def encoded(self, index: int) -> Encoded:
        part, place = self._part(index)
        return Encoded(part.ids(place), tuple(part.spans(place)), token_types=part.token_types(place))

    def row(self, index: int) -> Row:
        """Of a stage that keeps its rows."""
        part, place = self._part(index)
        return part.row(place)

    def row_ids(self) -> npt.NDArray[np.uint64]:
        """(sequences,) of the rows that they come from."""
        return np.concatenate([part.row_ids for part in self.parts] or [np.zeros(0, np.uint64)])

    def first(self, count: int) -> list[list[int]]:
        """The ids of the first sequences."""
        return [self.ids(index) for index in range(min(count, len(self)))]

    def facts(self) -> dict[str, Any]:
        """What became of the rows."""
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
    """All tokens of each part of a SequenceSet one after another, cut into blocks of `length`; the rest that fills no
    block is left out. Documents share blocks without a mask between them, as in GPT-3
    (https://arxiv.org/abs/2005.14165, section 2.2)."""

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
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        first = int(index - self._starts[number]) * self._length
        found: list[int] = self._sequences.parts[number].tokens[first : first + self._length].tolist()
        return found

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
        """What a reward is given: the conversation up to the response."""
        return as_prompt(self.sequences.row(index))

    def facts(self) -> dict[str, Any]:
        """What became of the rows."""
        stats = self.sequences.stats
        too_long = stats.unusable[TOO_LONG]
        return {
            "rows": stats.rows,
            "sequences": len(self),
            "too_long": too_long,
            "unusable": stats.num_unusable - too_long,
        }


class InMemorySequences:
    """Sequences in memory. Without `labels` every token counts."""

    def __init__(self, ids: Sequence[list[int]], labels: Sequence[list[int]] | None = None) -> None:
        self._ids, self._labels = ids, labels or ids
        self.lengths: Integers = np.array([len(sequence) for sequence in ids], np.int64)

    def ids(self, index: int) -> list[int]:
        return self._ids[index]

    def labels(self, index: int) -> list[int]:
        return self._labels[index]


ROW_ENCODINGS = {
    "pretrain": RowEncoding(encode_documents, tuple(CONTENT), "a text or a conversation"),
    "sft": RowEncoding(encode_conversations, tuple(CONTENT), "a conversation with a response"),
    "dpo": RowEncoding(
        encode_pairs, (*CONTENT, "rejected"), "a preference pair (`chosen` and `rejected`, docs/data.md)"
    ),
    "kto": RowEncoding(
        encode_rated, (*CONTENT, "rejected", "label"), "a rated response (`label`) or a preference pair (docs/data.md)"
    ),
    "reward": RowEncoding(
        encode_reward_pairs,
        (*CONTENT, "rejected"),
        "a preference pair (`chosen` and `rejected`, docs/data.md) whose responses differ within max_length",
    ),
    "classifier": RowEncoding(encode_labelled, (*CONTENT, "label"), "a text or a conversation with a label"),
    **dict.fromkeys(
        ("ppo", "grpo", "rloo"),
        RowEncoding(encode_prompt_rows, PROMPT_COLUMNS, "a conversation that asks something", keeps_rows=True),
    ),
}
"""By stage kind."""
LABELLED_BY_STAGE = RowEncoding(encode_unlabelled, tuple(CONTENT), "a text or a conversation")
"""Of `classifier`, where all rows of a stage have one label."""
NOT_COUNTED = frozenset({NO_LABEL})
"""Reasons that `max_unusable` does not count: a dataset may be labelled in part."""


def mixture_of(spec: Training[Any], examples: Examples) -> SequenceMixture | None:
    """Of a stage whose `data` is one."""
    if not isinstance(spec.data, dict):
        return None
    part_sizes = examples.part_sizes
    # A stage that gives no sequence has no share.
    weights = [weight if size else 0.0 for weight, size in zip(spec.data.values(), part_sizes, strict=True)]
    total = sum(weights)
    return SequenceMixture(tuple(part_sizes), tuple(weight / total for weight in weights)) if total else None


def mixture_facts(spec: Training[Any], examples: Examples, order: Integers) -> dict[str, Any]:
    """Of each data stage of a mixture: what became of its rows; the sequences and tokens that are trained on, and its
    share of all tokens."""
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
                "tokens": int(number),
                "share": float(number / tokens.sum()),
            }
            for stage, part, count, number in zip(spec.data, examples.part_stats, counts, tokens, strict=True)
        }
    }


def _row_counts(stats: TokenStats) -> dict[str, int]:
    return {"rows": stats.rows, "truncated": stats.truncated, "unusable": stats.num_unusable}


def read_sequences(
    job: Job, tokenizer: Any, encoding: Encoding | None = None
) -> tuple[TrainingSequences, TrainingSequences]:
    """Those that are trained on, and those that are evaluated (of `eval_data`). All ranks take part: rank 0 builds what
    is not in the store's cache. `encoding`: where the model decides on it too. Raises StageError when more rows are
    unusable than `max_unusable` allows, or none is left."""
    data, evaluated = open_sequences(job, tokenizer, encoding)
    check_sequences(job, data, evaluated)
    return data, evaluated


def read_row_sequences(job: Job, tokenizer: Any, encoding: Encoding | None = None) -> tuple[SequenceSet, SequenceSet]:
    """The same, of a training whose sequences are not cut into blocks."""
    data, evaluated = read_sequences(job, tokenizer, encoding)
    assert isinstance(data, SequenceSet), "only pretrain has blocks"
    assert isinstance(evaluated, SequenceSet)
    return data, evaluated


def open_sequences(
    job: Job, tokenizer: Any, encoding: Encoding | None = None
) -> tuple[TrainingSequences, TrainingSequences]:
    """As `read_sequences`, whatever the number of unusable rows."""
    encoding, kind = encoding or encoding_of(job.spec), ROW_ENCODINGS[job.spec.kind]
    found = [open_rows(job, rows, tokenizer, encoding, kind) for rows in (job.rows, job.eval_rows)]
    if isinstance(job.spec, Pretrain):
        return BlockSet(found[0], job.spec.max_length), BlockSet(found[1], job.spec.max_length)
    return found[0], found[1]


def check_sequences(job: Job, data: TrainingSequences, evaluated: TrainingSequences) -> None:
    """Raises StageError as `read_sequences` does; rank 0 lists the unusable rows in the artifact."""
    for field, found in (("data", data), ("eval_data", evaluated)):
        if found.parts:
            _check_usable(job, found, field)
    if _rank() == 0 and (data.stats.num_unusable or evaluated.stats.num_unusable):
        with (job.out / UNUSABLE).open("w", encoding="utf-8") as file:
            for field, found in (("data", data), ("eval_data", evaluated)):
                for row in _unusable_rows(found):
                    file.write(json.dumps({**row, "field": field}, ensure_ascii=False) + "\n")


def open_rows(
    job: Job, rows: Sequence[RowSource], tokenizer: Any, encoding: Encoding, kind: RowEncoding
) -> SequenceSet:
    """The sequences of `rows`. All ranks take part."""
    cache = TokenCache(job.store / "tokenized", job.store / "leases", *_reporting(job))
    parts = []
    for item in rows:
        name = os.path.relpath(item.path, job.store / "artifacts")
        get = cache.open_or_build if _rank() == 0 else cache.wait_for
        parts.append(get(item.path, name, tokenizer, encoding, kind if item.label is None else LABELLED_BY_STAGE))
    return SequenceSet(parts, [item.label for item in rows])


def _check_usable(job: Job, found: TrainingSequences, field: str) -> None:
    stats, spec, kind = found.stats, job.spec, ROW_ENCODINGS[job.spec.kind]
    stage = ", ".join(data_refs(getattr(spec, field)).values())
    if not len(found):
        short = isinstance(spec, Pretrain) and stats.num_unusable < stats.rows
        raise StageError(
            job.stage,
            f"none of the {stats.rows:,} rows of `{stage}` ({field}) gives a training sequence",
            cause=f"all texts together have fewer than max_length ({spec.max_length}) tokens"
            if short
            else _reasons(stats.unusable),
            remedy=f"give more rows, or lower max_length (now {spec.max_length})"
            if short
            else f"give rows of which each is {kind.what}, or change {_limits(spec)}",
        )
    unusable = Counter({reason: count for reason, count in stats.unusable.items() if reason not in NOT_COUNTED})
    count, rows = unusable.total(), stats.rows
    if count > spec.max_unusable * rows:
        raise StageError(
            job.stage,
            f"{count:,} of {rows:,} rows of `{stage}` ({field}) can't be trained on: {count / rows:.0%}, "
            f"and max_unusable is {spec.max_unusable:g}",
            cause=_reasons(unusable) + _example(found),
            remedy="repair or filter these rows (`tunery preview` shows rows as they are trained), change "
            f"{_limits(spec)} where they are too long, or allow more with `max_unusable`",
        )


def _limits(spec: Training[Any]) -> str:
    """The fields that say how long a sequence may be."""
    limits = f"max_length (now {spec.max_length})"
    sampling = getattr(spec, "sampling", None)
    return limits if sampling is None else f"{limits} or sampling.max_new_tokens (now {sampling.max_new_tokens})"


def _reasons(unusable: Counter[str]) -> str:
    return "; ".join(
        f"{count:,} {'row' if count == 1 else 'rows'}: {reason}" for reason, count in unusable.most_common(3)
    )


def _example(found: TrainingSequences) -> str:
    first = next(_unusable_rows(found), None)
    return "" if first is None else f"; the first of them: {first['source']}:{first['line']}"


def _unusable_rows(found: TrainingSequences) -> Iterator[dict[str, Any]]:
    for part in found.parts:
        yield from part.unusable_rows()


def _reporting(job: Job) -> tuple[Callable[[int, int], None], Callable[[str], None]]:
    log = EventLog(job.events / f"{job.trial or 'stage'}-{job.stage}-0.jsonl", stage=job.stage, trial=job.trial)

    def progress(done: int, total: int) -> None:
        log.write("progress", done=done, total=total, unit="rows", detail="tokenizing", preparing=True)

    def waiting(holder: str) -> None:
        log.write("progress", done=0, total=None, unit="rows", detail=f"waiting: {holder} tokenizes the same rows")

    return progress, waiting


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
