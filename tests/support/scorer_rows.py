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


def answer_row(answer: str, question: str = "Why?") -> Row:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return with_id({"text": None, "messages": turns, "rejected": None})


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
    st.builds(answer_row, hostile_texts, hostile_texts),
    hostile_texts.map(prompt_row),
    st.just(with_id({"text": None, "messages": [], "rejected": None})),
    st.just(with_id({"text": None, "messages": None, "rejected": None})),
)


def across(
    scorer: CorpusScorer, rows: list[Row], folder: Path, shard: int = 7, killed: int = 0
) -> dict[str, list[Any]]:
    """Run a corpus scorer on shards of rows and return all its columns, concatenated over the shards. `killed`: resolve
    this many shards first and abandon them, as if the process had been killed."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = [rows[start : start + shard] for start in range(0, len(rows), shard)]
    sketches = []
    for number, some in enumerate(shards):
        sketches.append(folder / f"sketch-{number:05d}.parquet")
        pq.write_table(pa.table({"id": [row["id"] for row in some], **scorer.compute_signatures(some)}), sketches[-1])
    joined: Columns = {}
    list(islice(scorer.resolve(RowSignatures(tuple(sketches)), folder / "work"), killed))
    resolved = list(scorer.resolve(RowSignatures(tuple(sketches)), folder / "work"))
    assert [len(columns["score"]) for columns in resolved] == [len(some) for some in shards]
    for columns in resolved:
        for name, values in columns.items():
            joined.setdefault(name, []).extend(values)
    return joined
