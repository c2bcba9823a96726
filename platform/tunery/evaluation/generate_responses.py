"""Generate the responses of several models to the same prompts and score them with a judge, on the workers of the run.

A task is one model and one batch of prompts. Tasks are ordered by model, and a worker has the judge and one model in
memory at a time. The responses of a task are written to the staging directory of the stage, so an interrupted
comparison resumes with the missing tasks.

The random numbers for sampling depend only on the seed and the row id. Every model gets the same numbers for a prompt,
and the number of workers, the shards and the order of rows change results only by rounding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tunery.models.encode import Encoding, as_prompt
from tunery.models.load import Source, source_of
from tunery.models.precision import score_dtype
from tunery.models.prompts import COLUMNS, TOO_LONG, encode_prompt_rows
from tunery.models.reward_functions import NO_LIMIT, reward_origin
from tunery.models.row_encodings import encoding_of
from tunery.spec import Compute, Sampling, WinRate
from tunery.store import StageContext
from tunery.store.atomic_write import write_text
from tunery.store.rows import shards

BATCH_ROWS = 256
"""Rows per task: a full batch on a GPU at 512 tokens (BATCH_TOKENS in models/generate.py), and few enough to distribute
some hundred prompts over several workers."""

Response = dict[str, Any]
"""A response with its prompt: row (number of the row in the data), id, prompt (messages), response (text), reward,
tokens (number, including the EOS token), ended (False if the response was truncated)."""


@dataclass(frozen=True)
class PromptBatch:
    """At most BATCH_ROWS rows of a shard."""

    shard: Path
    shard_start: int
    """Number in the data of the first row of the shard."""
    start: int
    """Index in the shard of the first row of the batch."""
    rows: int
    """Number of rows."""


@dataclass(frozen=True)
class BatchResponses:
    """The responses of one model to one batch."""

    read: int
    """Number of rows that were read."""
    too_long: int
    """Number of rows that were skipped because their prompt is too long."""
    unusable: int
    """Number of rows that were skipped for another reason."""
    responses: list[Response]


def prompt_batches(artifact: Path) -> list[PromptBatch]:
    """Split the rows of an artifact into batches. The split depends only on its shards."""
    batches: list[PromptBatch] = []
    shard_start = 0
    for shard in shards(artifact):
        rows = int(pq.read_metadata(shard).num_rows)
        batches += [
            PromptBatch(shard, shard_start, start, min(BATCH_ROWS, rows - start))
            for start in range(0, rows, BATCH_ROWS)
        ]
        shard_start += rows
    return batches


def generate_responses(
    context: StageContext, artifacts: dict[str, Path], batches: Sequence[PromptBatch]
) -> list[list[Path]]:
    """Generate all responses. Return for each batch one file per model (see `read_responses`). Tasks whose file is
    complete are skipped.

    artifacts: by stage name; batches: of the stage's `data`.
    """
    stage = context.spec
    assert isinstance(stage, WinRate)
    folder = context.staging_dir / "responses"
    folder.mkdir(parents=True, exist_ok=True)
    models = stage.evaluated_models
    files = [
        [folder / f"{model_index}-{batch.shard_start + batch.start}.jsonl" for model_index in range(len(models))]
        for batch in batches
    ]
    tasks: list[dict[str, Any]] = []
    done = 0
    for model_index, model in enumerate(models):
        source = json.dumps(source_of(model, artifacts, context.folder))
        for batch, batch_files in zip(batches, files, strict=True):
            if is_complete(batch_files[model_index]):
                done += batch.rows
                continue
            tasks.append(
                {
                    "source": source,
                    "shard": str(batch.shard),
                    "shard_start": batch.shard_start,
                    "start": batch.start,
                    "file": str(batch_files[model_index]),
                }
            )
    total = len(models) * sum(batch.rows for batch in batches)
    judge = json.dumps(reward_origin(stage.judge, artifacts, context.folder))
    constructor_args = (judge, context.seed, stage.sampling, encoding_of(stage), context.compute)
    context.emit("progress", done=done, total=total, unit="responses", detail="waiting for workers")
    results = context.launcher.map_tasks(ResponseGenerator, constructor_args, tasks) if tasks else iter(())
    for result in results:
        done += int(result["read"])
        context.emit("progress", done=done, total=total, unit="responses")
    return files


class ResponseGenerator:
    """Callable class for `Launcher.map_tasks` that generates responses to batches of prompts, with one model in memory
    at a time, and scores them with the judge."""

    def __init__(self, judge: str, seed: int, sampling: Sampling, encoding: Encoding, compute: Compute) -> None:
        """judge: a RewardOrigin as JSON."""
        import torch

        torch.set_num_threads(compute.cpus_per_worker)
        self._judge_origin, self._seed, self._sampling, self._encoding = judge, seed, sampling, encoding
        self._dtype = score_dtype(compute)
        self._device = torch.device("cuda" if compute.device == "gpu" else "cpu")
        self._judge: Any = None
        self._loaded: tuple[str, Any, Any, list[int]] = ("", None, None, [])
        """Source as JSON, engine, tokenizer and EOS token ids of the model in memory."""

    def _load(self, source: str) -> tuple[Any, Any, list[int]]:
        """Return the engine, tokenizer and EOS token ids of a model."""
        from tunery.models.generate import TransformersEngine, eos_token_ids
        from tunery.models.load import load_model, load_tokenizer

        if self._loaded[0] != source:
            self._loaded = ("", None, None, [])  # free the previous model before the next one is loaded
            model_source: Source = json.loads(source)
            model, tokenizer = load_model(model_source, self._dtype), load_tokenizer(model_source)
            model = model.to(self._device).eval()
            eos_ids = eos_token_ids(model, tokenizer)
            self._loaded = (source, TransformersEngine(model, eos_ids), tokenizer, eos_ids)
        return self._loaded[1:]

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        columns = (batch["source"], batch["shard"], batch["shard_start"], batch["start"], batch["file"])
        read = [
            self._generate(str(source), str(shard), int(shard_start), int(start), Path(str(file)))
            for source, shard, shard_start, start, file in zip(*columns, strict=True)
        ]
        return {"read": read}

    def _generate(self, source: str, shard: str, shard_start: int, start: int, file: Path) -> int:
        """Write the responses to a batch of prompts to `file`; return the number of rows read."""
        from tunery.models.generate import decode_response
        from tunery.models.reward_functions import load_reward
        from tunery.models.sampling import uniform_numbers

        if self._judge is None:
            # Not in __init__, where Ray would report only the text of an error, without its cause and remedy.
            self._judge = load_reward(json.loads(self._judge_origin), self._dtype, self._device, NO_LIMIT)
        engine, tokenizer, eos_ids = self._load(source)
        table = pq.read_table(shard, columns=list(COLUMNS)).slice(start, BATCH_ROWS).to_pylist()
        rows = [{**row, "row": shard_start + start + index} for index, row in enumerate(table)]
        encoded = list(encode_prompt_rows(rows, tokenizer, self._encoding))
        usable = [(as_prompt(row), item) for row, item in zip(rows, encoded, strict=True) if not item.unusable]
        prompts = [prompt for prompt, _ in usable]
        keys = [(int(prompt["id"], 16),) for prompt in prompts]
        uniform_bt = uniform_numbers(self._seed, "win_rate", keys, self._sampling.max_new_tokens)
        responses = engine([item.sequences[0].ids for _, item in usable], uniform_bt, self._sampling)
        texts = [decode_response(response.tokens, eos_ids, tokenizer) for response in responses]
        rewards = self._judge(prompts, texts) if texts else []
        too_long = sum(item.unusable == TOO_LONG for item in encoded)
        unusable = len(encoded) - len(usable) - too_long
        lines: list[dict[str, Any]] = [{"read": len(encoded), "too_long": too_long, "unusable": unusable}]
        for prompt, response, text, reward in zip(prompts, responses, texts, rewards, strict=True):
            messages = [
                {key: value for key, value in message.items() if value is not None} for message in prompt["messages"]
            ]
            lines.append(
                {
                    "row": prompt["row"],
                    "id": prompt["id"],
                    "prompt": messages,
                    "response": text,
                    "reward": reward,
                    "tokens": len(response.tokens),
                    "ended": response.ended,
                }
            )
        # Atomic: tasks whose file exists are skipped.
        write_text(file, "".join(json.dumps(line) + "\n" for line in lines))
        return len(encoded)


def is_complete(file: Path) -> bool:
    """Whether a file of `generate_responses` exists and has all its responses."""
    try:
        batch = read_responses(file)
    except (FileNotFoundError, ValueError, TypeError, StopIteration):
        return False
    return len(batch.responses) == batch.read - batch.too_long - batch.unusable


def read_responses(file: Path) -> BatchResponses:
    """Read a file of `generate_responses`: a line of counts, and a line per response."""
    with file.open(encoding="utf-8") as stream:
        lines: Iterator[Response] = map(json.loads, stream)
        counts = next(lines)
        return BatchResponses(**counts, responses=list(lines))
