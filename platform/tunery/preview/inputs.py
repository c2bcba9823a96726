"""What a stage feeds to models: which rows, encoded how, by the tokenizers of which models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tunery.errors import RequestError
from tunery.models.encode import Encoding
from tunery.models.preview import FORMATS, InputFormat, stage_encoding
from tunery.spec import (
    Embedding,
    Evaluate,
    Experiment,
    Ifd,
    Perplexity,
    Ppo,
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
from tunery.spec.references import model_name
from tunery.spec.stages import TRAININGS
from tunery.spec.trainings import data_refs
from tunery.store.rows import REVIEWED_DIR

Model = str | Pretrained | Scratch
KINDS = (*TRAININGS, "score", "evaluate", "win_rate")


@dataclass(frozen=True)
class ModelInput:
    """Rows of one stage for one model, or for several that have the same tokenizer."""

    title: str
    """Which of the stage's inputs it is; "" where there is one."""
    data: str
    """The stage that gives the rows."""
    models: tuple[Model, ...]
    input_format: InputFormat
    encoding: Encoding
    within: str = ""
    """A folder in the artifact of `data`."""
    loss_word: str = "trained"
    """What a token with a loss is called."""
    embeds: bool = False
    """The model gives vectors: it has no head."""


def preview_inputs(name: str, experiment: Experiment) -> list[ModelInput]:
    """Raises RequestError for a stage that there is not, or that feeds no rows to a model."""
    stage = experiment.stages.get(name)
    able = [other for other, one in experiment.stages.items() if one.kind in KINDS]
    if stage is None:
        raise RequestError(f"there is no stage `{name}`", remedy=nearest(name, able))
    found: list[ModelInput] = []
    if isinstance(stage, Training):
        found = list(_of_training(stage, name))
    elif isinstance(stage, Score):
        found = list(_of_score(stage))
    elif isinstance(stage, Evaluate):
        encoding = stage_encoding(stage)
        found = [
            ModelInput(title, data, (model,), FORMATS[stage.kind], encoding, loss_word="counted")
            for title, data in stage.data.items()
            for model in stage.models
        ]
    elif isinstance(stage, WinRate):
        encoding = stage_encoding(stage)
        found = [ModelInput("", stage.data, (model,), "prompt", encoding) for model in stage.contestants]
    if not found:
        cause = "none of its scorers has a model" if isinstance(stage, Score) else f"it is a {stage.kind} stage"
        raise RequestError(f"`{name}` feeds no rows to a model", cause=cause, remedy=nearest(name, able))
    return _joined(found, experiment)


def _of_training(stage: Training[Any], name: str) -> Iterator[ModelInput]:
    # What begins from scratch has the tokenizer that it trains itself.
    model: Model = name if isinstance(stage.model, Scratch) else stage.model
    for path, data in data_refs(stage.data).items():
        yield ModelInput(
            ".".join(path),
            data,
            (model,),
            FORMATS[stage.kind],
            stage_encoding(stage),
            within=REVIEWED_DIR if isinstance(stage.data, ReviewLabels) else "",
        )
    if isinstance(stage, Ppo) and stage.ptx is not None:
        yield ModelInput("ptx", stage.ptx.data, (model,), "scored", Encoding(stage.max_length, "last_turn"))


def _of_score(stage: Score) -> Iterator[ModelInput]:
    for scorer in stage.by:
        if scorer.model is not None:
            yield ModelInput(
                scorer.score,
                stage.data,
                (scorer.model,),
                _format_of(scorer),
                stage_encoding(stage),
                loss_word="counted",
                embeds=isinstance(scorer, Embedding),
            )


def _format_of(scorer: ScorerSpec) -> InputFormat:
    if isinstance(scorer, Ifd):
        return "ifd"
    if isinstance(scorer, Perplexity):
        return "all_tokens" if scorer.of == "whole" else "scored"
    return "classifier"


def _joined(inputs: list[ModelInput], experiment: Experiment) -> list[ModelInput]:
    """Inputs that become the same tokens as one: fine-tuned models have the tokenizer of their base."""
    found: dict[object, ModelInput] = {}
    for item in inputs:
        (model,) = item.models
        key = (item.data, item.within, item.input_format, _tokenizer_of(model, experiment))
        if (same := found.get(key)) is None:
            found[key] = item
            continue
        titles = dict.fromkeys(title for title in (*same.title.split(", "), item.title) if title)
        found[key] = replace(same, title=", ".join(titles), models=(*same.models, model))
    several = len({item.title for item in found.values()}) < len(found)
    return [
        replace(item, title=f"{item.title} {' and '.join(map(model_name, item.models))}".strip()) if several else item
        for item in found.values()
    ]


def _tokenizer_of(model: Model, experiment: Experiment) -> Model:
    """What brings the tokenizer of a model: a pretrained model, or the stage that begins from scratch."""
    *stages, root = model_chain(experiment.stages, model)
    return stages[-1] if isinstance(root, Scratch) else root
