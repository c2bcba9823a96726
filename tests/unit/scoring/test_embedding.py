"""Similarity to reference rows: embeddings equal those of transformers for single rows, and the nearest reference."""

from __future__ import annotations

import math
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scorer_rows import response_row, text_row
from scoring_runs import ROWS, run_score_stage
from small_classifiers import write_encoder, write_language_model
from transformers import AutoModel, AutoTokenizer

from tunery.errors import TuneryError
from tunery.models.embed import Embedder
from tunery.models.load import load_encoder, load_original_tokenizer
from tunery.scoring.scorers import embedding as embedding_module
from tunery.scoring.scorers.embedding import EmbeddingScorer, reference_rows
from tunery.store import Artifact
from tunery.store.rows import Row, write_rows
from tunery.store.vectors import vectors_of

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    write_encoder(folder / "encoder", ["red", "green", "blue"])
    write_language_model(folder / "causal")
    return folder


def embedder(source: dict[str, Any], batch_tokens: int | None = None) -> Embedder:
    model = load_encoder(source, torch.float32).eval()
    return Embedder(model, load_original_tokenizer(source), 64, batch_tokens)


def pretrained(folder: Path) -> dict[str, Any]:
    return {"pretrained": str(folder), "revision": None}


@cache
def load_transformers(folder: Path) -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def expected_embedding(folder: Path, row: Row) -> np.ndarray:
    """Return the embedding computed with transformers: the mean over all tokens, normalized to length 1."""
    tokenizer, model = load_transformers(folder)
    options: dict[str, Any] = {"return_tensors": "pt"}
    if not row["messages"]:
        tokens = tokenizer(row["text"], **options)
    elif tokenizer.chat_template is not None:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        tokens = tokenizer(text, add_special_tokens=False, **options)
    else:
        tokens = tokenizer(*([message["content"]] for message in row["messages"]), **options)
    with torch.inference_mode():
        mean: np.ndarray = model(**tokens).last_hidden_state[0].mean(0).numpy()
    return mean / float(np.linalg.norm(mean))


@pytest.mark.parametrize("name", ["encoder", "causal"])
def test_embedding_is_the_mean_hidden_state_independent_of_the_batch(name: str, folder: Path) -> None:
    expected = np.stack([expected_embedding(folder / name, row) for row in ROWS])
    assert np.ptp(expected[:, 0]) > 0.1, "the embeddings of the rows must differ"
    for budget in (1, 40, 100_000):
        actual = embedder(pretrained(folder / name), budget)(ROWS)
        np.testing.assert_allclose(actual.vectors, expected, atol=1e-5)
        assert actual.vectors.dtype == np.float32


def test_stage_model_and_its_folder_give_equal_embeddings(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "causal", tmp_path / "artifact" / "model")
    vectors = embedder({"artifact": str(tmp_path / "artifact")})(ROWS).vectors
    np.testing.assert_array_equal(vectors, embedder(pretrained(folder / "causal"))(ROWS).vectors)


def test_score_is_the_cosine_with_the_nearest_reference_row() -> None:
    scorer = EmbeddingScorer(np.array([[1, 0], [0, 1], [-1, 0]], np.float32), ["east", "north", "west"])
    rows = np.array([[0.6, 0.8], [0.8, -0.6], [-1, 0], [math.nan, math.nan]], np.float32)
    columns = scorer(rows)
    assert columns["score"] == pytest.approx([0.8, 0.8, 1.0, math.nan], nan_ok=True)
    assert columns["nearest"] == ["north", "east", "west", ""]


def test_reference_sample_is_independent_of_row_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [text_row(f"row {n}") for n in range(40)]
    for name, ordered in (("a", rows), ("b", rows[::-1])):
        write_rows([{**row, "injected_corruption": ""} for row in ordered], tmp_path / name)
    assert len(reference_rows(tmp_path / "a")) == 40
    monkeypatch.setattr(embedding_module, "MAX_REFERENCES", 7)
    sampled = [row["id"] for row in reference_rows(tmp_path / "a")]
    assert len(sampled) == 7
    assert sampled == [row["id"] for row in reference_rows(tmp_path / "b")]
    assert sampled != [row["id"] for row in rows[:7]]


def reference_artifact(folder: Path, rows: list[Row], fingerprint: str) -> Artifact:
    write_rows([{**row, "injected_corruption": ""} for row in rows], folder / fingerprint)
    manifest = {"kind": "dataset", "fingerprint": fingerprint, "facts": {"rows": len(rows)}}
    return Artifact(folder / fingerprint, manifest, {})


def test_scores_are_recomputed_when_the_references_change(folder: Path, tmp_path: Path) -> None:
    by = [{"embedding": {"pretrained": "./encoder"}, "reference": "near"}]
    references = [response_row("it is blue", "how"), ROWS[3]]
    both = reference_artifact(tmp_path, references, "a")
    result = run_score_stage(folder, tmp_path, "one", by, near=both)
    assert (result.facts["rows_in"], result.facts["rows_out"]) == (len(ROWS), len(ROWS))
    assert result.facts["scores"]["embedding"]["good"] == "high"
    (shard,) = (tmp_path / "one" / "out" / "scores").iterdir()
    table = pq.read_table(shard).to_pydict()
    similarities = (
        np.stack([expected_embedding(folder / "encoder", row) for row in ROWS])
        @ np.stack([expected_embedding(folder / "encoder", row) for row in references]).T
    )
    np.testing.assert_allclose(table["embedding"], similarities.max(axis=1), atol=1e-5)
    assert table["embedding_nearest"] == [references[index]["id"] for index in similarities.argmax(axis=1)]
    assert table["embedding"][3] == pytest.approx(1.0, abs=1e-5), "it is among the references"
    assert run_score_stage(folder, tmp_path, "again", by, near=both).runtime_stats["rows_scored"] == 0
    other = run_score_stage(folder, tmp_path, "other", by, near=reference_artifact(tmp_path, references[:1], "b"))
    assert other.runtime_stats["rows_scored"] == len(ROWS)


def test_vectors_without_references_are_stored_and_cached(folder: Path, tmp_path: Path) -> None:
    by = [{"embedding": {"pretrained": "./causal"}}]
    empty_row = text_row("")
    result = run_score_stage(folder, tmp_path, "one", by, rows=[*ROWS, empty_row])
    assert result.facts["vectors"] == {"embedding": {"rows": len(ROWS), "missing": 1, "dimensions": 16}}
    assert result.facts["scores"] == {}
    assert result.facts["tokens"] > 0
    (shard,) = (tmp_path / "one" / "out" / "scores").iterdir()
    table = pq.read_table(shard)
    assert np.isnan(table["embedding"].to_numpy()).all()
    expected = np.stack([expected_embedding(folder / "causal", row) for row in ROWS])
    vectors = vectors_of(table["embedding_vector"])
    np.testing.assert_allclose(vectors[:-1], expected, atol=1e-3)
    assert np.isnan(vectors[-1]).all()
    assert run_score_stage(folder, tmp_path, "again", by, rows=[*ROWS, empty_row]).runtime_stats["rows_scored"] == 0
    (again,) = (tmp_path / "again" / "out" / "scores").iterdir()
    np.testing.assert_array_equal(vectors_of(pq.read_table(again)["embedding_vector"]), vectors)


def test_references_without_tokens_are_an_error(folder: Path, tmp_path: Path) -> None:
    by = [{"embedding": {"pretrained": "./causal"}, "reference": "near"}]
    with pytest.raises(TuneryError, match=r"no row of `near` can serve as reference\ncause: all"):
        run_score_stage(folder, tmp_path, "empty", by, near=reference_artifact(tmp_path, [text_row("")], "a"))
