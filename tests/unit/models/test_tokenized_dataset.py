"""Tokenized rows on disk: equal to encoding the rows, built once by any number of processes; mixtures."""

from __future__ import annotations

import json
import threading
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_classifiers import write_language_model

from tunery.models import token_cache
from tunery.models.encode import Encoding
from tunery.models.encode_rows import RowEncoding, encode_conversations, encode_documents
from tunery.models.load import load_tokenizer
from tunery.models.token_cache import TokenCache, cache_key
from tunery.models.tokenized_dataset import TokenizedDataset, is_complete
from tunery.models.truncation import encode_sequences
from tunery.store import rows as store_rows
from tunery.store.rows import CONTENT, write_rows
from tunery.training.batches import SequenceMixture, data_order
from tunery.training.sequences import BlockSet, SequenceSet


def conversation(number: int, **fields: Any) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": f"what is row {number}"},
        {"role": "assistant", "content": "the model " * (number % 5 + 1)},
    ]
    return {"id": f"{number:016x}", "messages": messages, "source": "rows.jsonl", "line": number + 1, **fields}


ROWS = [
    *(conversation(number) for number in range(40)),
    conversation(40, messages=[{"role": "user", "content": "no answer"}]),
    {"id": f"{41:016x}", "text": "a text of its own", "source": "rows.jsonl", "line": 42},
]


CONVERSATIONS = RowEncoding(encode_conversations, tuple(CONTENT), "a conversation", "conversation")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"pretrained": str(write_language_model(tmp_path_factory.mktemp("base"))), "revision": None}


@pytest.fixture
def tokenizer(source: dict[str, Any]) -> Any:
    return load_tokenizer(source)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(store_rows, "SHARD", 16)
    write_rows(ROWS, tmp_path / "artifact")
    return tmp_path / "artifact"


def build(folder: Path, rows: Path, tokenizer: Any, encoding: Encoding, **options: Any) -> TokenizedDataset:
    cache = TokenCache(folder / "tokenized", folder / "leases", **options)
    return cache.open_or_build(rows, "dataset-1", tokenizer, encoding, CONVERSATIONS)


def test_sequences_equal_the_encoded_rows(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    encoding = Encoding(24)
    actual = build(tmp_path, rows, tokenizer, encoding)
    expected = [item for items in encode_sequences(ROWS, tokenizer, encoding) for item in items if item.spans]
    assert [actual.ids(index) for index in range(len(actual))] == [item.ids for item in expected]
    assert [actual.labels(index) for index in range(len(actual))] == [item.labels for item in expected]
    assert [actual.loss_tokens(index) for index in range(len(actual))] == [item.num_loss_tokens for item in expected]
    assert actual.lengths.tolist() == [len(item.ids) for item in expected]
    assert actual.row_ids.tolist() == [*range(40), 41]
    assert actual.stats.rows == 42 == len(actual) + actual.stats.num_unusable
    assert actual.stats.truncated == sum(item.truncated for item in expected) > 0
    assert actual.stats.tokens == actual.tokens.size == sum(len(item.ids) for item in expected)


def test_unusable_rows_are_listed_with_file_line_and_reason(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    actual = build(tmp_path, rows, tokenizer, Encoding(24))
    assert list(actual.unusable_rows()) == [
        {"id": f"{40:016x}", "source": "rows.jsonl", "line": 41, "reason": "no response is left to train on"}
    ]
    assert actual.stats.unusable == {"no response is left to train on": 1}


def test_multiple_processes_write_the_same_files_as_one(
    rows: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    single = build(tmp_path / "one", rows, tokenizer, Encoding(24))
    monkeypatch.setattr(token_cache, "PARALLEL_ROWS", 1)
    monkeypatch.setattr(token_cache, "available_cpus", lambda: 2)
    progress: list[tuple[int, int]] = []
    parallel = build(tmp_path / "two", rows, tokenizer, Encoding(24), progress=lambda *counts: progress.append(counts))
    files = sorted(path.name for path in single.folder.iterdir())
    assert files == sorted(path.name for path in parallel.folder.iterdir())
    for name in files:
        assert (single.folder / name).read_bytes() == (parallel.folder / name).read_bytes(), name
    assert progress == [(16, 42), (32, 42), (42, 42)]


def test_concurrent_openers_build_once(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    encoded_rows: list[int] = []

    def counted_encode(chunk: Any, tokenizer: Any, encoding: Any) -> Any:
        encoded_rows.append(len(chunk))
        return encode_conversations(chunk, tokenizer, encoding)

    def open_dataset() -> None:
        cache = TokenCache(tmp_path / "tokenized", tmp_path / "leases")
        cache.open_or_build(
            rows, "dataset-1", tokenizer, Encoding(24), RowEncoding(counted_encode, tuple(CONTENT), "", "conversation")
        )

    threads = [threading.Thread(target=open_dataset) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(encoded_rows) == 42


def test_interrupted_build_is_repeated(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    complete = build(tmp_path / "complete", rows, tokenizer, Encoding(24))
    key = complete.folder.name
    staging = tmp_path / "interrupted" / "tokenized" / f".{key}.0123456789abcdef"
    staging.mkdir(parents=True)
    (staging / "tokens.bin").write_bytes(b"half")
    rebuilt = build(tmp_path / "interrupted", rows, tokenizer, Encoding(24))
    assert (rebuilt.folder / "tokens.bin").read_bytes() == (complete.folder / "tokens.bin").read_bytes()
    assert not staging.exists()


@pytest.mark.parametrize(
    "name", ["stats.json", "tokens.bin", "offsets.npy", "spans.npy", "span_offsets.npy", "row_ids.npy", "labels.npy"]
)
def test_dataset_with_a_truncated_file_is_built_again(name: str, rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    folder = build(tmp_path, rows, tokenizer, Encoding(24)).folder
    assert is_complete(folder)
    content = (folder / name).read_bytes()
    size = len(content.rstrip(b"\n")) if name == "stats.json" else len(content)
    for length in {*range(0, size, 97), size - 1}:
        (folder / name).write_bytes(content[:length])
        assert not is_complete(folder), length
    build(tmp_path, rows, tokenizer, Encoding(24))
    assert (folder / name).read_bytes() == content


def test_cache_key_covers_exactly_rows_tokenizer_template_and_settings(
    rows: Path, source: dict[str, Any], tmp_path: Path
) -> None:
    def key(name: str = "a", template: str | None = None, artifact: Path = rows, **fields: Any) -> str:
        tokenizer = load_tokenizer(source)
        tokenizer.chat_template = template or tokenizer.chat_template
        tokenizer("a text", truncation=True, max_length=3)  # options of one call must not change the key
        return cache_key(artifact, name, tokenizer, Encoding(**{"max_length": 64, **fields}), encode_conversations)

    write_rows(ROWS[1:], tmp_path / "fewer")

    keys = [
        key(),
        key("b"),
        key(artifact=tmp_path / "fewer"),
        key(template=load_tokenizer(source).chat_template + " "),
        key(max_length=65),
        key(train_on="last_turn"),
        key(truncate="left"),
        key(empty_thinking="train"),
    ]
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_template_with_the_date_has_a_key_per_day(
    rows: Path, source: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(template: str, day: int) -> str:
        class FixedDate(date):
            @classmethod
            def today(cls) -> date:
                return date(2026, 11, day)

        monkeypatch.setattr(token_cache, "date", FixedDate)
        tokenizer = load_tokenizer(source)
        tokenizer.chat_template = template + tokenizer.chat_template
        return cache_key(rows, "a", tokenizer, Encoding(64), encode_conversations)

    assert key("{{ strftime_now('%d') }}", 1) != key("{{ strftime_now('%d') }}", 2)
    assert key("", 1) == key("", 2)


def test_documents_train_all_tokens_of_every_row(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    cache = TokenCache(tmp_path / "tokenized", tmp_path / "leases")
    encoding = Encoding(2**31 - 1, "all_tokens")
    actual = cache.open_or_build(
        rows, "dataset-1", tokenizer, encoding, RowEncoding(encode_documents, tuple(CONTENT), "", "documents")
    )
    assert len(actual) == actual.stats.rows == 42, "a conversation without a response is included"
    assert all(actual.loss_tokens(index) == len(actual.ids(index)) - 1 for index in range(len(actual)))


def test_no_usable_row_is_an_empty_dataset(tokenizer: Any, tmp_path: Path) -> None:
    write_rows([ROWS[40]], tmp_path / "artifact")
    actual = build(tmp_path, tmp_path / "artifact", tokenizer, Encoding(24))
    assert (len(actual), actual.stats.rows, actual.stats.num_unusable) == (0, 1, 1)


def test_blocks_are_consecutive_tokens_of_a_data_stage(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    part = build(tmp_path, rows, tokenizer, Encoding(2**31 - 1))
    blocks = BlockSet(SequenceSet([part, part]), 50)
    assert blocks.part_sizes == [part.tokens.size // 50] * 2
    joined = [token for index in range(blocks.part_sizes[0]) for token in blocks.ids(index)]
    assert joined == part.tokens[: len(joined)].tolist()
    assert blocks.ids(blocks.part_sizes[0]) == blocks.ids(0)
    assert set(blocks.lengths.tolist()) == {50}


def test_sequence_set_of_several_datasets_has_one_index(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    part = build(tmp_path, rows, tokenizer, Encoding(24))
    combined = SequenceSet([part, part])
    assert len(combined) == 2 * len(part)
    assert combined.ids(len(part) + 3) == part.ids(3)
    assert combined.stats.rows == 2 * part.stats.rows
    assert part.stats.rows == 42, "the counts of the parts must not change"


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.5, 0.5), (0.01, 0.99), (1.0, 0.0)])
def test_every_prefix_of_a_mixture_has_the_source_weights(weights: tuple[float, float]) -> None:
    mixture = SequenceMixture((50, 200), weights)
    order = data_order(np.ones(250, np.int64), 100, 10, 7, mixture)
    first_source_counts = np.cumsum(np.sort(order.reshape(100, 10) < 50, axis=1).sum(axis=1))
    expected = np.arange(1, 101) * 10 * weights[0]
    assert np.abs(first_source_counts - expected).max() <= 1
    assert order.tolist() == data_order(np.ones(250, np.int64), 100, 10, 7, mixture).tolist()
    assert order.tolist() != data_order(np.ones(250, np.int64), 100, 10, 8, mixture).tolist()


def test_mixture_repeats_a_small_source_in_whole_epochs() -> None:
    order = data_order(np.ones(110, np.int64), 20, 10, 1, SequenceMixture((10, 100), (0.5, 0.5)))
    counts = Counter(order.tolist())
    assert {counts[index] for index in range(10)} == {10}
    assert {counts[index] for index in range(10, 110)} == {1}


def test_order_without_a_mixture_is_unchanged() -> None:
    assert data_order([5, 3, 9, 1], 2, 3, 5).tolist() == [0, 1, 3, 2, 2, 3]


def test_stats_are_json_of_counts(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    actual = build(tmp_path, rows, tokenizer, Encoding(24))
    stats = json.loads((actual.folder / "stats.json").read_text())
    assert stats["rows"] == 42
    assert stats["sequences"] == 41
