"""Tokenised rows on disk, memory-mapped: encoded once, shared by all workers, trials and stages.

    <store>/tokenized/<cache key>/
        tokens.bin        uint32, all sequences one after the other
        offsets.npy       int64 (sequences + 1): where each begins in tokens.bin
        spans.npy         int32 (spans, 2): begin and end of trained tokens, within their sequence
        span_offsets.npy  int64 (sequences + 1): the spans of each sequence
        rows.npy          int64 (sequences): which row of the artifact each comes from
        labels.npy        int8 (sequences): the row's label, -1 where it has none
        unusable.jsonl    a line for each row that gives no sequence: id, source, line, reason
        stats.json        what became of the rows (`TokenStats`)

The cache key covers the rows (the artifact's manifest and the sizes of its shards), the content of the tokenizer with
its chat template, the `Encoding`, how rows become sequences (`ENCODING_VERSION`, and the versions of the libraries that
render and tokenise), and today's date where the chat template writes it. Shards are encoded in parallel, and the number
of processes changes nothing in the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from tunery.errors import TuneryError
from tunery.models.encode import ENCODING_VERSION, Encoded, Encoding, Span, encode_sequences, encode_whole, labels_of
from tunery.models.load import Source, load_tokenizer
from tunery.store import Lease
from tunery.store.rows import Row, shards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Integers = npt.NDArray[np.int64]
FORMAT = 1
"""Of the files: part of the cache key."""
PARALLEL_ROWS = 20_000
"""From so many rows on, processes are started: they take some 5 s to import transformers."""
POLL_SECONDS = 0.2
BATCH = 1000
"""Rows that are encoded together."""
_NO_LABEL = -1


@dataclass
class TokenizedRow:
    """The sequences that a row gives, or why it gives none."""

    sequences: list[Encoded]
    labels: list[int] = field(default_factory=list)
    unusable: str = ""


EncodeRows = Callable[[Sequence[Row], "PreTrainedTokenizerBase", Encoding], Iterator[TokenizedRow]]
"""A function of a module: it travels to other processes by its name."""


@dataclass
class TokenStats:
    """What became of the rows of an artifact."""

    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    truncated: int = 0
    """Rows of which a part was cut off."""
    unusable: Counter[str] = field(default_factory=Counter)
    """Rows that give no sequence, by reason."""
    dropped_reasoning: int = 0
    """Assistant turns whose reasoning the chat template does not render."""
    escaped_tokens: int = 0
    """Special tokens in the text of rows, encoded as ordinary text."""

    def add(self, other: TokenStats) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def num_unusable(self) -> int:
        return sum(self.unusable.values())


class TokenizedDataset:
    """The sequences of one artifact's rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._offsets: Integers = np.load(folder / "offsets.npy", mmap_mode="r")
        self._spans = np.load(folder / "spans.npy", mmap_mode="r")
        self._span_offsets: Integers = np.load(folder / "span_offsets.npy", mmap_mode="r")
        self.rows: Integers = np.load(folder / "rows.npy", mmap_mode="r")
        self._labels = np.load(folder / "labels.npy", mmap_mode="r")
        size = int(self._offsets[-1])
        # An empty file can't be mapped.
        self.tokens: npt.NDArray[np.uint32] = (
            np.memmap(folder / "tokens.bin", np.uint32, "r", shape=(size,)) if size else np.zeros(0, np.uint32)
        )
        stats = json.loads((folder / "stats.json").read_text())
        self.stats = TokenStats(**{**stats, "unusable": Counter(stats["unusable"])})

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def lengths(self) -> Integers:
        """(sequences,) tokens of each."""
        return np.diff(self._offsets)

    def ids(self, index: int) -> list[int]:
        found: list[int] = self.tokens[self._offsets[index] : self._offsets[index + 1]].tolist()
        return found

    def spans(self, index: int) -> list[Span]:
        start, end = self._span_offsets[index], self._span_offsets[index + 1]
        return [(int(first), int(last)) for first, last in self._spans[start:end]]

    def labels(self, index: int) -> list[int]:
        """`ids` with -100 where no loss counts."""
        return labels_of(self.ids(index), self.spans(index))

    def loss_tokens(self, index: int) -> int:
        return sum(end - max(start, 1) for start, end in self.spans(index) if end > 1)

    def row_label(self, index: int) -> bool | None:
        label = int(self._labels[index])
        return None if label == _NO_LABEL else bool(label)

    @property
    def wanted(self) -> int:
        """Sequences whose row has the label true."""
        return int((self._labels == 1).sum())

    def unusable_rows(self) -> Iterator[dict[str, Any]]:
        with (self.folder / "unusable.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


@dataclass(frozen=True)
class TokenCache:
    """Where tokenised rows are kept, and how to tell of one that is being built."""

    folder: Path
    leases: Path
    progress: Callable[[int, int], None] = lambda done, total: None
    """Rows encoded, and rows in all."""
    waiting: Callable[[str], None] = lambda holder: None

    def path(self, key: str) -> Path:
        return self.folder / key

    def open_or_build(
        self,
        rows: Path,
        rows_name: str,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        encoding: Encoding,
        encode_rows: EncodeRows,
        columns: Sequence[str],
    ) -> TokenizedDataset:
        """The rows of an artifact (at `rows`, called `rows_name` in the cache key) as sequences. `source` is where
        processes load `tokenizer` from. One process builds, others wait for it."""
        final = self.path(cache_key(rows, rows_name, tokenizer, encoding, encode_rows))
        if not (final / "stats.json").is_file():
            with Lease(self.leases / f"tokenized-{final.name}", self.waiting):
                if not (final / "stats.json").is_file():
                    job = _Encoder(source, encoding, encode_rows, (*columns, "id", "source", "line"))
                    self._build(rows, final, job, tokenizer)
        return TokenizedDataset(final)

    def wait_for(
        self,
        rows: Path,
        rows_name: str,
        tokenizer: PreTrainedTokenizerBase,
        encoding: Encoding,
        encode_rows: EncodeRows,
    ) -> TokenizedDataset:
        """The same, built by another process. A collective of all ranks would time out while a large dataset is built;
        when the process that builds fails, Ray Train ends this one too."""
        final = self.path(cache_key(rows, rows_name, tokenizer, encoding, encode_rows))
        while not (final / "stats.json").is_file():
            time.sleep(POLL_SECONDS)
        return TokenizedDataset(final)

    def _build(self, rows: Path, final: Path, job: _Encoder, tokenizer: PreTrainedTokenizerBase) -> None:
        for left in final.parent.glob(f"{final.name}.staging-*"):  # by a build that was cut off
            shutil.rmtree(left, ignore_errors=True)
        staging = final.with_name(f"{final.name}.staging-{uuid.uuid4().hex[:8]}")
        staging.mkdir(parents=True)
        files = shards(rows)
        counts = [int(pq.read_metadata(file).num_rows) for file in files]
        total, done = sum(counts), 0
        parts = [staging / f"part-{number:05d}" for number in range(len(files))]
        processes = min(available_cpus(), len(files)) if total >= PARALLEL_ROWS else 1
        with ExitStack() as stack:
            if processes > 1:
                # Not forked: a process that has threads, or CUDA, can't be.
                pool = stack.enter_context(ProcessPoolExecutor(processes, get_context("spawn"), _start_process, (job,)))
                results: Iterator[TokenStats] = pool.map(_encode_shard, files, parts)
            else:
                job.tokenizer = tokenizer
                results = map(job, files, parts)
            stats = TokenStats()
            try:
                for count, found in zip(counts, results, strict=True):
                    stats.add(found)
                    done += count
                    self.progress(done, total)
            except BrokenProcessPool as error:
                raise TuneryError(
                    f"a process that tokenizes rows died after {done:,} of {total:,} rows",
                    cause="it was killed; mostly the machine ran out of memory",
                    remedy="free memory, or allow fewer CPUs to this process: each takes about 400 MiB",
                ) from error
        _merge(parts, staging, counts)
        (staging / "stats.json").write_text(json.dumps({**asdict(stats), "unusable": dict(stats.unusable)}) + "\n")
        shutil.rmtree(final, ignore_errors=True)  # without stats: a build that was cut off
        staging.rename(final)


def cache_key(
    rows: Path, rows_name: str, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, encode_rows: EncodeRows
) -> str:
    """16 hex digits."""
    dated = "strftime_now" in json.dumps(tokenizer.chat_template)
    what = [
        FORMAT,
        ENCODING_VERSION,
        [metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")],
        rows_name,
        _rows_key(rows),
        tokenizer_key(tokenizer),
        asdict(encoding),
        encode_rows.__name__,
        date.today().isoformat() if dated else "",
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _rows_key(rows: Path) -> list[Any]:
    """Of an artifact's rows. Its name holds the cache key of what was asked for; a score on other hardware, and so what
    a filter keeps by it, may differ under the same name."""
    manifests = [path for path in (rows / "manifest.json", rows.parent / "manifest.json") if path.is_file()]
    manifest = hashlib.sha256(manifests[0].read_bytes()).hexdigest() if manifests else ""
    return [manifest, [[shard.name, shard.stat().st_size] for shard in shards(rows)]]


def available_cpus() -> int:
    """Of this process: its affinity, and the quota of its container (cgroup v2)."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of all that decides what tokens a text becomes: models that share a tokenizer share tokenised rows."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Any = dict(tokenizer.get_vocab()) if backend is None else json.loads(backend.to_str())
    for changing in ("truncation", "padding"):  # set by the last call, not by the model
        content.pop(changing, None)
    what = [type(tokenizer).__name__, content, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class _Encoder:
    """Encodes shards, in this process or another one."""

    source: Source
    encoding: Encoding
    encode_rows: EncodeRows
    columns: tuple[str, ...]
    tokenizer: Any = None

    def __call__(self, shard: Path, part: Path) -> TokenStats:
        if self.tokenizer is None:
            self.tokenizer = load_tokenizer(self.source)
        table = pq.read_table(shard, columns=list(dict.fromkeys(self.columns)))
        stats = TokenStats()
        lengths: list[int] = []
        span_counts: list[int] = []
        spans: list[Span] = []
        numbers: list[int] = []
        labels: list[int] = []
        part.mkdir()
        with (part / "tokens.bin").open("wb") as tokens, (part / "unusable.jsonl").open("w", encoding="utf-8") as lost:
            for start in range(0, table.num_rows, BATCH):
                rows = table.slice(start, BATCH).to_pylist()
                for place, (row, found) in enumerate(
                    zip(rows, self.encode_rows(rows, self.tokenizer, self.encoding), strict=True)
                ):
                    stats.rows += 1
                    stats.dropped_reasoning += sum(item.dropped_reasoning for item in found.sequences)
                    stats.escaped_tokens += sum(item.escaped_tokens for item in found.sequences)
                    if found.unusable:
                        stats.unusable[found.unusable] += 1
                        where = {name: row[name] for name in ("id", "source", "line")}
                        lost.write(json.dumps({**where, "reason": found.unusable}, ensure_ascii=False) + "\n")
                        continue
                    stats.truncated += any(item.truncated for item in found.sequences)
                    for number, item in enumerate(found.sequences):
                        tokens.write(np.asarray(item.ids, np.uint32).tobytes())
                        lengths.append(len(item.ids))
                        span_counts.append(len(item.spans))
                        spans += item.spans
                        numbers.append(start + place)
                        labels.append(found.labels[number] if found.labels else _NO_LABEL)
                        stats.loss_tokens += item.num_loss_tokens
        stats.sequences, stats.tokens = len(lengths), sum(lengths)
        np.save(part / "lengths.npy", np.array(lengths, np.int64))
        np.save(part / "span_counts.npy", np.array(span_counts, np.int64))
        np.save(part / "spans.npy", np.array(spans, np.int32).reshape(-1, 2))
        np.save(part / "rows.npy", np.array(numbers, np.int64))
        np.save(part / "labels.npy", np.array(labels, np.int8))
        return stats


_process_encoder: _Encoder | None = None


def _start_process(encoder: _Encoder) -> None:
    """In a process of the pool. Each has a core: the tokenizer's own threads would only be in each other's way."""
    global _process_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _process_encoder = encoder


def _encode_shard(shard: Path, part: Path) -> TokenStats:
    assert _process_encoder is not None, "set when the process started"
    return _process_encoder(shard, part)


def _merge(parts: Sequence[Path], target: Path, row_counts: Sequence[int]) -> None:
    """Parts one after the other, then removed. Memory: the numbers of a sequence, not its tokens."""
    first_rows = np.concatenate([[0], np.cumsum(row_counts)])
    with (target / "tokens.bin").open("wb") as tokens, (target / "unusable.jsonl").open("wb") as lost:
        for part in parts:
            for name, stream in (("tokens.bin", tokens), ("unusable.jsonl", lost)):
                with (part / name).open("rb") as file:
                    shutil.copyfileobj(file, stream, 1 << 20)

    def joined(name: str) -> npt.NDArray[Any]:
        return np.concatenate([np.load(part / f"{name}.npy") for part in parts])

    for name, target_name in (("lengths", "offsets"), ("span_counts", "span_offsets")):
        np.save(target / f"{target_name}.npy", np.concatenate([[0], np.cumsum(joined(name))]).astype(np.int64))
    for name in ("spans", "labels"):
        np.save(target / f"{name}.npy", joined(name))
    rows = [np.load(part / "rows.npy") + first for part, first in zip(parts, first_rows, strict=False)]
    np.save(target / "rows.npy", np.concatenate(rows))
    for part in parts:
        shutil.rmtree(part)


# How rows become sequences


def encode_conversations(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> Iterator[TokenizedRow]:
    """For `sft`: the sequences of each text or conversation."""
    for sequences in encode_sequences(rows, tokenizer, encoding):
        reason = next((item.rejected for item in sequences if item.rejected), "")
        if not reason and not any(item.num_loss_tokens for item in sequences):
            reason = "no response is left to train on"
        yield TokenizedRow([item for item in sequences if item.num_loss_tokens] or sequences, unusable=reason)


def encode_documents(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> Iterator[TokenizedRow]:
    """For `pretrain`: all tokens of each text or conversation."""
    for item in encode_whole(rows, tokenizer, encoding):
        yield TokenizedRow([item], unusable=item.rejected or ("" if item.ids else "it has no token"))
