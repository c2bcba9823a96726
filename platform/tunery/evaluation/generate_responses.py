"""Answers of several models to the same prompts, rated by a judge, on Ray Data.

One pipeline for all models, as in heldout.py: the units of work are (model, part of a shard), models one after another,
and an actor holds one model at a time beside the judge. A unit writes its answers into the stage's work folder, so that
an interrupted comparison goes on with those that are missing.

Which numbers an answer is drawn by depends on the seed and the row's id alone: every model gets the same for a prompt,
and workers, shards and the order of rows change nothing but rounding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tunery.models.actor_pool import map_tasks, score_dtype
from tunery.models.encode import Encoding, as_prompt, encoding_of
from tunery.models.load import Source, source_of
from tunery.models.prompts import COLUMNS, TOO_LONG, encode_prompt_rows
from tunery.models.reward_functions import NO_LIMIT, reward_origin
from tunery.spec import Compute, Sampling, WinRate
from tunery.store import StageContext
from tunery.store.rows import shards

PART = 256
"""Rows of a unit: a full batch of a GPU at 512 tokens (BATCH_TOKENS in models/generate.py), and so few that some
hundred prompts already spread over several workers."""

Line = dict[str, Any]
"""An answer: row (its number in the data), id, prompt (turns), answer, reward, tokens (with the one that ended it),
ended (else it was cut off)."""


@dataclass(frozen=True)
class PromptBatch:
    """At most PART rows of a shard."""

    shard: Path
    first: int
    """Number of the shard's first row in the data."""
    start: int
    """In the shard."""
    rows: int


@dataclass(frozen=True)
class BatchResponses:
    """What one model made of one part."""

    read: int
    too_long: int
    unusable: int
    lines: list[Line]


def prompt_batches(artifact: Path) -> list[PromptBatch]:
    """Where they end depends on the rows alone."""
    parts: list[PromptBatch] = []
    first = 0
    for shard in shards(artifact):
        rows = int(pq.read_metadata(shard).num_rows)
        parts += [PromptBatch(shard, first, start, min(PART, rows - start)) for start in range(0, rows, PART)]
        first += rows
    return parts


def generate_responses(
    context: StageContext, artifacts: dict[str, Path], parts: Sequence[PromptBatch]
) -> list[list[Path]]:
    """For each part a file of every contestant (see `read_responses`). Those that are there are not made again."""
    stage = context.spec
    assert isinstance(stage, WinRate)
    folder = context.work / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    models = stage.contestants
    files = [[folder / f"{place}-{part.first + part.start}.jsonl" for place in range(len(models))] for part in parts]
    units: list[dict[str, Any]] = []
    done = 0
    for place, model in enumerate(models):
        source = json.dumps(source_of(model, artifacts, context.folder))
        for part, made in zip(parts, files, strict=True):
            if made[place].exists():
                done += part.rows
                continue
            at = {"shard": str(part.shard), "first": part.first, "start": part.start}
            units.append({"source": source, **at, "file": str(made[place])})
    total = len(models) * sum(part.rows for part in parts)
    judge = json.dumps(reward_origin(stage.judge, artifacts, context.folder))
    arguments = (judge, context.seed, stage.sampling, encoding_of(stage), context.compute)
    context.emit("progress", done=done, total=total, unit="answers", detail="starting actors")
    results = map_tasks(GenerationActor, arguments, units, context.compute, context.in_process) if units else iter(())
    for result in results:
        done += int(result["read"])
        context.emit("progress", done=done, total=total, unit="answers")
    return files


class GenerationActor:
    """Answers parts of shards with one model after another, and rates what it answered."""

    def __init__(self, judge: str, seed: int, sampling: Sampling, encoding: Encoding, compute: Compute) -> None:
        """judge: a RewardOrigin as JSON."""
        import torch

        torch.set_num_threads(compute.cpus_per_worker)
        self._origin, self._seed, self._sampling, self._encoding = judge, seed, sampling, encoding
        self._dtype = score_dtype(compute)
        self._device = torch.device("cuda" if compute.device == "gpu" else "cpu")
        self._judge: Any = None
        self._loaded: tuple[str, Any, Any, list[int]] = ("", None, None, [])

    def _load(self, source: str) -> tuple[Any, Any, list[int]]:
        """Engine, tokenizer and end tokens of a model."""
        from tunery.models.generate import TransformersEngine, eos_token_ids
        from tunery.models.load import load_model, load_tokenizer

        if self._loaded[0] != source:
            self._loaded = ("", None, None, [])  # let go of the last one before the next takes memory
            where: Source = json.loads(source)
            model, tokenizer = load_model(where, self._dtype).to(self._device).eval(), load_tokenizer(where)
            end = eos_token_ids(model, tokenizer)
            self._loaded = (source, TransformersEngine(model, end), tokenizer, end)
        return self._loaded[1:]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        columns = (batch["source"], batch["shard"], batch["first"], batch["start"], batch["file"])
        read = [
            self._answer(str(source), str(shard), int(first), int(start), Path(str(file)))
            for source, shard, first, start, file in zip(*columns, strict=True)
        ]
        return {"read": read}

    def _answer(self, source: str, shard: str, first: int, start: int, file: Path) -> int:
        """Writes the answers to a part; returns how many rows it read."""
        from tunery.models.generate import decode_response
        from tunery.models.reward_functions import load_reward
        from tunery.models.sampling import uniform_numbers

        if self._judge is None:
            # Not in __init__: of an error there Ray tells the text, not the exception with its cause and remedy.
            self._judge = load_reward(json.loads(self._origin), self._dtype, self._device, NO_LIMIT)
        engine, tokenizer, end = self._load(source)
        table = pq.read_table(shard, columns=list(COLUMNS)).slice(start, PART).to_pylist()
        numbered = [{**row, "row": first + start + place} for place, row in enumerate(table)]
        encoded = list(encode_prompt_rows(numbered, tokenizer, self._encoding))
        usable = [(as_prompt(row), item) for row, item in zip(numbered, encoded, strict=True) if not item.unusable]
        prompts = [row for row, _ in usable]
        keys = [(int(row["id"], 16),) for row in prompts]
        uniform_bt = uniform_numbers(self._seed, "win_rate", keys, self._sampling.max_new_tokens)
        drawn = engine([item.sequences[0].ids for _, item in usable], uniform_bt, self._sampling)
        texts = [decode_response(answer.tokens, end, tokenizer) for answer in drawn]
        rewards = self._judge(prompts, texts) if texts else []
        too_long = sum(item.unusable == TOO_LONG for item in encoded)
        unusable = len(encoded) - len(usable) - too_long
        lines: list[Line] = [{"read": len(encoded), "too_long": too_long, "unusable": unusable}]
        for row, answer, text, reward in zip(prompts, drawn, texts, rewards, strict=True):
            turns = [{key: value for key, value in turn.items() if value is not None} for turn in row["messages"]]
            told = {"answer": text, "reward": reward, "tokens": len(answer.tokens), "ended": answer.ended}
            lines.append({"row": row["row"], "id": row["id"], "prompt": turns, **told})
        aside = file.with_suffix(".part")  # whole or not at all: what is there is not made again
        aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        aside.replace(file)
        return len(encoded)


def read_responses(file: Path) -> BatchResponses:
    with file.open(encoding="utf-8") as stream:
        lines: Iterator[Line] = map(json.loads, stream)
        counts = next(lines)
        return BatchResponses(**counts, lines=list(lines))
