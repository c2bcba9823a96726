"""Rows for tests of scorers, and a function that runs a scorer without a stage."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from tunery.scoring.scorers.external_groupby import RowSignatures
from tunery.scoring.scorers.interfaces import Columns, CorpusScorer
from tunery.store.rows import Row, row_id


def text_row(text: str) -> Row:
    return with_id({"text": text, "messages": None, "rejected": None})


def response_row(response: str, question: str = "Why?") -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return with_id({"text": None, "messages": messages, "rejected": None})


def prompt_row(question: str) -> Row:
    return with_id({"text": None, "messages": [{"role": "user", "content": question}], "rejected": None})


def with_id(row: Row) -> Row:
    return {"id": row_id(row), **row}


HOSTILE = [
    "",
    " \t\n\u2028 ",
    "!!! ... ??? ###",
    "😀👩‍👩‍👧‍👦🏳️‍🌈" * 3,
    "e\u0301\u0315\u0300" * 50,
    "\u202eshalom \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "该函数返回目录中所有文件的列表" * 5,
    "def f(x):\n    return {y: [z for z in x] for y in x}  # …\n" * 4,
    "a" * 3000,
    "\x00\x01\ufffd\ud7ff",
    "a b " * 200,
    "- x\n\n- x\n\n- x...\n",
]
hostile_texts = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=200))
hostile_rows = st.one_of(
    hostile_texts.map(text_row),
    st.builds(response_row, hostile_texts, hostile_texts),
    hostile_texts.map(prompt_row),
    st.just(with_id({"text": None, "messages": [], "rejected": None})),
    st.just(with_id({"text": None, "messages": None, "rejected": None})),
)


def score_corpus(
    scorer: CorpusScorer, rows: list[Row], folder: Path, shard: int = 7, abandoned: int = 0
) -> dict[str, list[Any]]:
    """Run a corpus scorer on shards of rows and return all its columns, concatenated over the shards.

    `abandoned`: resolve this many shards first and discard them, as if the process had been killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = [rows[start : start + shard] for start in range(0, len(rows), shard)]
    signatures = []
    for number, shard_rows in enumerate(shards):
        signatures.append(folder / f"signatures-{number:05d}.parquet")
        pq.write_table(
            pa.table({"id": [row["id"] for row in shard_rows], **scorer.compute_signatures(shard_rows)}), signatures[-1]
        )
    all_columns: Columns = {}
    list(islice(scorer.resolve(RowSignatures(tuple(signatures)), folder / "work"), abandoned))
    resolved = list(scorer.resolve(RowSignatures(tuple(signatures)), folder / "work"))
    assert [len(columns["score"]) for columns in resolved] == [len(shard_rows) for shard_rows in shards]
    for columns in resolved:
        for name, values in columns.items():
            all_columns.setdefault(name, []).extend(values)
    return all_columns
