"""The model inputs of a stage: which rows, encoded how, with which models' tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tunery.errors import RequestError
from tunery.models.encode import Encoding
from tunery.models.encode_rows import InputFormat
from tunery.models.preview import training_input
from tunery.models.row_encodings import encoding_of
from tunery.spec import (
    Evaluate,
    Experiment,
    Pretrained,
    ReviewLabels,
    Score,
    ScorerSpec,
    Scratch,
    Training,
    WinRate,
)
from tunery.spec.error_messages import nearest
from tunery.spec.graph import model_chain
from tunery.spec.references import ROWS, model_name
from tunery.spec.scorers import SCORERS
from tunery.spec.trainings import data_refs
from tunery.store.rows import REVIEWED_DIR

Model = str | Pretrained | Scratch


@dataclass(frozen=True)
class ModelInput:
    """Rows of one stage for one model, or for several models with the same tokenizer."""

    title: str
    """Name among the stage's inputs; "" if it has only one."""
    data: str
    """The stage with the rows."""
    models: tuple[Model, ...]
    input_format: InputFormat
    encoding: Encoding
    within: str = ""
    """Subfolder in the artifact of `data`."""
    loss_word: str = "trained"
    """Word for tokens with a loss."""
    embeds: bool = False
    """The model computes embeddings and has no head."""


def preview_inputs(name: str, experiment: Experiment) -> list[ModelInput]:
    """The model inputs of a stage. Raises RequestError if the stage does not exist or feeds no rows to a model."""
    stage = experiment.stages.get(name)
    supported = [other for other, one in experiment.stages.items() if one.output_type not in ("rows", "selected")]
    if stage is None:
        raise RequestError(f"there is no stage `{name}`", remedy=nearest(name, supported))
    inputs: list[ModelInput] = []
    if isinstance(stage, Training):
        inputs = list(_training_inputs(stage, name))
    elif isinstance(stage, Score):
        inputs = list(_score_inputs(stage))
    elif isinstance(stage, Evaluate):
        encoding = Encoding(stage.max_length)
        inputs = [
            ModelInput(title, data, (model,), "conversation", encoding, loss_word="counted")
            for title, data in stage.data.items()
            for model in stage.models
        ]
    elif isinstance(stage, WinRate):
        encoding = encoding_of(stage)
        inputs = [ModelInput("", stage.data, (model,), "prompt", encoding) for model in stage.evaluated_models]
    if not inputs:
        cause = "none of its scorers has a model" if isinstance(stage, Score) else f"it is a {stage.kind} stage"
        raise RequestError(f"`{name}` feeds no rows to a model", cause=cause, remedy=nearest(name, supported))
    return _merge(inputs, experiment)


def _training_inputs(stage: Training[Any], name: str) -> Iterator[ModelInput]:
    # A model from scratch trains its own tokenizer.
    model: Model = name if isinstance(stage.model, Scratch) else stage.model
    for path, data in data_refs(stage.data).items():
        yield ModelInput(
            ".".join(path),
            data,
            (model,),
            *training_input(stage),
            within=REVIEWED_DIR if isinstance(stage.data, ReviewLabels) else "",
        )
    for item in stage.inputs():
        if item.accepts == ROWS and item.path[0] not in ("data", "eval_data"):  # such as `ptx.data` of PPO
            encoding = Encoding(stage.max_length, "last_turn")
            yield ModelInput(str(item.path[0]), item.stage, (model,), "scored", encoding)


def _score_inputs(stage: Score) -> Iterator[ModelInput]:
    for scorer in stage.by:
        if scorer.model is not None:
            yield ModelInput(
                scorer.score,
                stage.data,
                (scorer.model,),
                _input_format(scorer),
                Encoding(stage.max_length, "last_turn"),
                loss_word="counted",
                embeds=SCORERS[scorer.kind()].input_kind == "embedding",
            )


def _input_format(scorer: ScorerSpec) -> InputFormat:
    entry = SCORERS[scorer.kind()]
    if entry.input_kind != "likelihood":
        return "classifier"
    spans = entry.load()(scorer).spans
    if "unconditional" in spans:
        return "ifd"
    return "all_tokens" if "all" in spans else "scored"


def _merge(inputs: list[ModelInput], experiment: Experiment) -> list[ModelInput]:
    """Merge inputs with equal token sequences: fine-tuned models share the tokenizer of their base."""
    merged: dict[object, ModelInput] = {}
    for item in inputs:
        (model,) = item.models
        key = (item.data, item.within, item.input_format, _tokenizer_source(model, experiment))
        if (same := merged.get(key)) is None:
            merged[key] = item
            continue
        titles = dict.fromkeys(title for title in (*same.title.split(", "), item.title) if title)
        merged[key] = replace(same, title=", ".join(titles), models=(*same.models, model))
    ambiguous = len({item.title for item in merged.values()}) < len(merged)
    return [
        replace(item, title=f"{item.title} {' and '.join(map(model_name, item.models))}".strip()) if ambiguous else item
        for item in merged.values()
    ]


def _tokenizer_source(model: Model, experiment: Experiment) -> Model:
    """The origin of a model's tokenizer: a pretrained model, or the stage that trains a model from scratch."""
    *stages, root = model_chain(experiment.stages, model)
    return stages[-1] if isinstance(root, Scratch) else root
