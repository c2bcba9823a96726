"""The `dataset` stage: rows from a source, in one schema; what can't be read goes to quarantine.jsonl."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator

from tunery.data.corrupt import corrupt
from tunery.data.read import Quarantined, read_source
from tunery.errors import StageError
from tunery.spec import Dataset
from tunery.store import StageContext, StageResult
from tunery.store.rows import Row, Shape, row_id, shape_of, write_rows


def make_dataset(context: StageContext) -> StageResult:
    """Facts: rows, quarantined, duplicates (rows whose id was there before), shape, source, split, planted by kind."""
    stage = context.spec
    assert isinstance(stage, Dataset)
    planted: Counter[str] = Counter()
    shapes: Counter[Shape] = Counter()
    quarantined = 0
    ids: set[str] = set()
    duplicates = 0

    # What UTF-8 has no bytes for (half of a surrogate pair) is written as the JSON escape that it was read from.
    with (context.out / "quarantine.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as file:

        def quarantine(line: Quarantined) -> None:
            nonlocal quarantined
            quarantined += 1
            file.write(json.dumps(dataclasses.asdict(line), ensure_ascii=False) + "\n")

        def finished() -> Iterator[Row]:
            nonlocal duplicates
            rows: Iterator[Row] = read_source(stage, context.folder, quarantine)
            if stage.corrupt:
                rows = iter(corrupt(list(rows), stage.corrupt, context.seed))
            for count, row in enumerate(rows, 1):
                row = {**row, "id": row_id(row)}
                duplicates += row["id"] in ids
                ids.add(row["id"])
                shapes[shape_of(row)] += 1
                if row.get("planted") is not None:
                    planted[row["planted"]] += 1
                if count % 2000 == 0:
                    context.emit("progress", done=count, total=None, unit="rows")
                yield row

        rows = write_rows(finished(), context.out)

    if rows == 0:
        raise StageError(
            context.name,
            f"`{stage.source}` gave no row",
            cause=f"{quarantined} lines could not be read, and the split is `{stage.split}`",
            remedy="see the first reasons below, or choose another split"
            + "".join(f"\n  {line}" for line in (context.out / "quarantine.jsonl").read_text().splitlines()[:3]),
        )
    return StageResult(
        {
            "rows": rows,
            "quarantined": quarantined,
            "duplicates": duplicates,
            "shape": shapes.most_common(1)[0][0],
            "source": f"{stage.source}/{stage.subset}" if stage.subset else stage.source,
            "split": stage.split,
            "planted": dict(sorted(planted.items())),
        }
    )
