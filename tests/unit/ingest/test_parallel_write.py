"""Shards written from several files equal those that one process writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunery.ingest.parallel_write import RowFile, write_files
from tunery.store import rows as rows_module
from tunery.store.rows import SCHEMA, content_bytes, shards, write_tables
from tunery.training.launch import InProcessLauncher


def table_of(lengths: list[int], start: int) -> pa.Table:
    rows = [{"id": f"{start + n:016x}", "text": "x" * length, "line": n} for n, length in enumerate(lengths)]
    return pa.Table.from_pylist(rows, SCHEMA)


def save(folder: Path, number: int, table: pa.Table, kept: list[bool] | None, as_arrow: bool) -> RowFile:
    path = folder / f"{number}.{'arrow' if as_arrow else 'parquet'}"
    if as_arrow:
        with pa.ipc.new_file(str(path), SCHEMA) as writer:
            writer.write_table(table, max_chunksize=3)
    else:
        pq.write_table(table, path)
    selected = table if kept is None else table.filter(pa.array(kept, pa.bool_()))
    np.save(folder / f"{number}.sizes.npy", content_bytes(selected))
    mask = None
    if kept is not None:
        mask = folder / f"{number}.kept.npy"
        np.save(mask, np.array(kept, np.bool_))
    return RowFile(path, folder / f"{number}.sizes.npy", mask, line_offset=10 * number)


@given(
    st.lists(st.tuples(st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=12), st.booleans()), max_size=6)
)
@settings(max_examples=60)
def test_shards_equal_those_of_one_process(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[list[tuple[int, bool]], bool]]
) -> None:
    folder = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "SHARD", 4)
        patch.setattr(rows_module, "SHARD_BYTES", 50)
        saved, expected = [], []
        for number, (rows, as_arrow) in enumerate(files):
            lengths, kept = [length for length, _ in rows], [keep for _, keep in rows]
            table = table_of(lengths, 100 * number)
            saved.append(save(folder, number, table, None if as_arrow else kept, as_arrow))
            if not as_arrow:
                table = pq.read_table(saved[-1].path).filter(pa.array(kept, pa.bool_()))
            column = SCHEMA.get_field_index("line")
            expected.append(table.set_column(column, SCHEMA.field(column), pa.compute.add(table["line"], 10 * number)))
        count = write_tables(expected, folder / "one")
        progress: list[int] = []
        assert write_files(InProcessLauncher(), False, saved, folder / "many", progress.append) == count
    assert [path.read_bytes() for path in shards(folder / "one")] == [
        path.read_bytes() for path in shards(folder / "many")
    ]
    assert [path.name for path in shards(folder / "many")] == [path.name for path in shards(folder / "one")]
    assert progress[-1] == count
    assert not [*(folder / "many" / "rows").glob(".*")], "temporary files"
