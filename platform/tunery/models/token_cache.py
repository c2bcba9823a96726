"""The cache of tokenised rows in the store: rows are encoded once for all workers, trials and stages.

The cache key covers the rows (the artifact's manifest and the sizes of its shards), the content of the tokenizer with
its chat template, the `Encoding`, the version of the encoding (`ENCODING_VERSION`, and the versions of the libraries
that render and tokenise), and today's date if the chat template uses it. Shards are encoded in parallel; the files do
not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tunery.errors import TuneryError
from tunery.models.encode import ENCODING_VERSION, Encoding, Span
from tunery.models.encode_rows import EncodeRows, RowEncoding
from tunery.models.tokenized_dataset import TokenizedDataset, TokenStats, is_complete
from tunery.store import Lease
from tunery.store.atomic_write import publish_folder, remove_temporaries, temporary_name
from tunery.store.rows import shards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 2
"""Version of the file format, part of the cache key."""
PARALLEL_ROWS = 20_000
"""Rows from which worker processes are used; they take about 5 s to import transformers."""
POLL_SECONDS = 0.2
"""Time between two checks whether another process has built a dataset."""
BATCH_ROWS = 1000
"""Rows per encoding batch."""
_NO_LABEL = -1


@dataclass(frozen=True)
class TokenCache:
    """The cache of tokenised datasets in the store."""

    folder: Path
    """Folder of the datasets."""
    leases: Path
    """Folder of the leases."""
    progress: Callable[[int, int], None] = lambda done, total: None
    """Called with the number of encoded rows, and of all rows."""
    waiting: Callable[[str], None] = lambda holder: None
    """Called with the name of another process that builds the dataset."""

    def path(self, key: str) -> Path:
        return self.folder / key

    def open_or_build(
        self,
        rows: Path,
        rows_name: str,
        tokenizer: PreTrainedTokenizerBase,
        encoding: Encoding,
        row_encoding: RowEncoding,
    ) -> TokenizedDataset:
        """Return the tokenised rows of an artifact. One process builds them, and others wait for it.

        rows: folder of the artifact; rows_name: its name in the cache key.
        """
        target = self.path(cache_key(rows, rows_name, tokenizer, encoding, row_encoding.encode_rows))
        if not is_complete(target):
            with Lease(self.leases / f"tokenized-{target.name}", self.waiting):
                if not is_complete(target):
                    self._build(rows, target, _Encoder(tokenizer, encoding, row_encoding))
        return TokenizedDataset(target)

    def wait_for(
        self,
        rows: Path,
        rows_name: str,
        tokenizer: PreTrainedTokenizerBase,
        encoding: Encoding,
        row_encoding: RowEncoding,
    ) -> TokenizedDataset:
        """Wait until another process has built the dataset, and return it. Arguments as in `open_or_build`.

        A collective of all ranks would time out while a large dataset is built. If the process that builds it fails,
        Ray Train stops this one too.
        """
        target = self.path(cache_key(rows, rows_name, tokenizer, encoding, row_encoding.encode_rows))
        while not is_complete(target):
            time.sleep(POLL_SECONDS)
        return TokenizedDataset(target)

    def _build(self, rows: Path, target: Path, encoder: _Encoder) -> None:
        remove_temporaries(target)  # of an interrupted build
        staging = temporary_name(target)
        staging.mkdir(parents=True)
        files = shards(rows)
        counts = [int(pq.read_metadata(file).num_rows) for file in files]
        total, done = sum(counts), 0
        parts = [staging / f"part-{number:05d}" for number in range(len(files))]
        processes = min(available_cpus(), len(files)) if total >= PARALLEL_ROWS else 1
        with ExitStack() as stack:
            if processes > 1:
                # Do not fork: this process may have threads or CUDA contexts.
                pool = stack.enter_context(
                    ProcessPoolExecutor(processes, get_context("spawn"), _start_process, (encoder,))
                )
                results: Iterator[TokenStats] = pool.map(_encode_shard, files, parts)
            else:
                results = map(encoder, files, parts)
            stats = TokenStats()
            try:
                for count, shard_stats in zip(counts, results, strict=True):
                    stats.add(shard_stats)
                    done += count
                    self.progress(done, total)
            except BrokenProcessPool as error:
                raise TuneryError(
                    f"a process that tokenizes rows died after {done:,} of {total:,} rows",
                    cause="it was killed, usually because the machine ran out of memory",
                    remedy="free memory, or allow fewer CPUs to this process: each takes about 400 MiB",
                ) from error
        _merge(parts, staging)
        (staging / "stats.json").write_text(json.dumps({**asdict(stats), "unusable": dict(stats.unusable)}) + "\n")
        shutil.rmtree(target, ignore_errors=True)  # incomplete
        publish_folder(staging, target)


def cache_key(
    rows: Path, rows_name: str, tokenizer: PreTrainedTokenizerBase, encoding: Encoding, encode_rows: EncodeRows
) -> str:
    """Return the cache key of the tokenised rows of an artifact: 16 hex digits."""
    uses_date = "strftime_now" in json.dumps(tokenizer.chat_template)
    inputs = [
        FORMAT,
        ENCODING_VERSION,
        [metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")],
        rows_name,
        _rows_key(rows),
        tokenizer_key(tokenizer),
        asdict(encoding),
        encode_rows.__name__,
        date.today().isoformat() if uses_date else "",
    ]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _rows_key(rows: Path) -> list[Any]:
    """Return a key of the content of an artifact. Its name does not suffice: scores may differ between devices, and so
    may the rows that a filter keeps."""
    manifests = [path for path in (rows / "manifest.json", rows.parent / "manifest.json") if path.is_file()]
    manifest_hash = hashlib.sha256(manifests[0].read_bytes()).hexdigest() if manifests else ""
    return [manifest_hash, [[shard.name, shard.stat().st_size] for shard in shards(rows)]]


def available_cpus() -> int:
    """Return the number of CPUs that this process may use, by its affinity and its container's quota (cgroup v2)."""
    count = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):
        return count


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that determines the tokens of a text. Models with equal tokenizers share tokenised
    rows."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content: Any = dict(tokenizer.get_vocab()) if backend is None else json.loads(backend.to_str())
    for name in ("truncation", "padding"):  # set by the last call, not by the model
        content.pop(name, None)
    inputs = [type(tokenizer).__name__, content, tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class _Encoder:
    """Encodes shards, in this process or in another one."""

    tokenizer: PreTrainedTokenizerBase
    encoding: Encoding
    row_encoding: RowEncoding

    def __call__(self, shard: Path, part: Path) -> TokenStats:
        """Encode a shard, write its files to the new folder `part`, and return its counts."""
        columns = [*self.row_encoding.columns, "id", "source", "line"]
        table = pq.read_table(shard, columns=list(dict.fromkeys(columns)))
        stats = TokenStats()
        lengths: list[int] = []
        span_counts: list[int] = []
        spans: list[Span] = []
        row_ids: list[int] = []
        labels: list[int] = []
        part.mkdir()
        with ExitStack() as stack:
            tokens, types = (stack.enter_context((part / f"{name}.bin").open("wb")) for name in ("tokens", "types"))
            unusable_file = stack.enter_context((part / "unusable.jsonl").open("w", encoding="utf-8"))
            rows_file = None
            if self.row_encoding.keeps_rows:
                rows_file = stack.enter_context(pa.ipc.new_file(str(part / "rows.arrow"), table.schema))
            for start in range(0, table.num_rows, BATCH_ROWS):
                batch = table.slice(start, BATCH_ROWS)
                rows, usable = batch.to_pylist(), []
                for row, encoded in zip(
                    rows, self.row_encoding.encode_rows(rows, self.tokenizer, self.encoding), strict=True
                ):
                    stats.rows += 1
                    usable.append(not encoded.unusable)
                    stats.dropped_reasoning += sum(item.dropped_reasoning for item in encoded.sequences)
                    stats.escaped_tokens += sum(item.escaped_tokens for item in encoded.sequences)
                    if encoded.unusable:
                        stats.unusable[encoded.unusable] += 1
                        origin = {name: row[name] for name in ("id", "source", "line")}
                        unusable_file.write(
                            json.dumps({**origin, "reason": encoded.unusable}, ensure_ascii=False) + "\n"
                        )
                        continue
                    stats.truncated += any(item.truncated for item in encoded.sequences)
                    for index, item in enumerate(encoded.sequences):
                        tokens.write(np.asarray(item.ids, np.uint32).tobytes())
                        types.write(bytes(item.token_types or ()))
                        lengths.append(len(item.ids))
                        span_counts.append(len(item.spans))
                        spans += item.spans
                        row_ids.append(int(row["id"], 16))
                        labels.append(encoded.labels[index] if encoded.labels else _NO_LABEL)
                        stats.loss_tokens += item.num_loss_tokens
                if rows_file is not None:
                    rows_file.write_table(batch.filter(pa.array(usable)).combine_chunks())
        stats.sequences, stats.tokens = len(lengths), sum(lengths)
        np.save(part / "lengths.npy", np.array(lengths, np.int64))
        np.save(part / "span_counts.npy", np.array(span_counts, np.int64))
        np.save(part / "spans.npy", np.array(spans, np.int32).reshape(-1, 2))
        np.save(part / "row_ids.npy", np.array(row_ids, np.uint64))
        np.save(part / "labels.npy", np.array(labels, np.int8))
        return stats


_process_encoder: _Encoder | None = None


def _start_process(encoder: _Encoder) -> None:
    """Initialize a process of the pool. The pool has one process per CPU, so the tokenizer's threads are disabled."""
    global _process_encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _process_encoder = encoder


def _encode_shard(shard: Path, part: Path) -> TokenStats:
    assert _process_encoder is not None, "set when the process started"
    return _process_encoder(shard, part)


def _merge(parts: Sequence[Path], target: Path) -> None:
    """Concatenate the files of the parts and remove the parts. Numbers per sequence are in memory, but no tokens."""
    for name in ("tokens.bin", "types.bin", "unusable.jsonl"):
        with (target / name).open("wb") as stream:
            for part in parts:
                with (part / name).open("rb") as file:
                    shutil.copyfileobj(file, stream, 1 << 20)
    if parts and (parts[0] / "rows.arrow").is_file():
        readers = [pa.ipc.open_file(pa.memory_map(str(part / "rows.arrow"))) for part in parts]
        with pa.ipc.new_file(str(target / "rows.arrow"), readers[0].schema) as writer:
            for reader in readers:
                for number in range(reader.num_record_batches):
                    writer.write_batch(reader.get_batch(number))

    def concatenated(name: str) -> npt.NDArray[Any]:
        return np.concatenate([np.load(part / f"{name}.npy") for part in parts])

    for name, target_name in (("lengths", "offsets"), ("span_counts", "span_offsets")):
        np.save(target / f"{target_name}.npy", np.concatenate([[0], np.cumsum(concatenated(name))]).astype(np.int64))
    for name in ("spans", "labels", "row_ids"):
        np.save(target / f"{name}.npy", concatenated(name))
    for part in parts:
        shutil.rmtree(part)
