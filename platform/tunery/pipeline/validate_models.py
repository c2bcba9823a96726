"""What a stage asks of its models that their configs can answer: positions for `max_length` tokens, and the layers that
`target_modules` names.

A model that is a stage has the architecture of the one at the root of its chain: a folder, a hub name, or a new one.
Before a run that is looked up without the network; of a hub model that is not downloaded, when the stage starts, before
its workers do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunery.errors import SpecError, StageError
from tunery.models.meta_model import (
    MARGIN,
    Form,
    check_target_modules,
    config_of_folder,
    declared_positions,
    outline,
    position_limit,
)
from tunery.models.model_folder import BadModel
from tunery.models.scratch import SHAPES
from tunery.pipeline.cache_keys import model_folder, models_of
from tunery.spec import (
    ClassificationSpec,
    ClassifierTraining,
    Embedding,
    Experiment,
    LoraTuner,
    Pretrained,
    RewardTraining,
    Score,
    Scratch,
)
from tunery.spec.error_messages import error_at
from tunery.spec.graph import Root, root_model
from tunery.spec.references import model_name
from tunery.spec.yaml_source import Path as KeyPath
from tunery.spec.yaml_source import YamlSource


def validate_models(
    name: str, stage: Any, experiment: Experiment, source: YamlSource, folder: Path
) -> Iterator[SpecError]:
    """Before a run."""
    for paths, error in _wrong(stage, experiment, folder, download=False):
        # A default has no line: then that of the model.
        places = [("stages", name, *path) for path in paths]
        at = next((place for place in places if place in source.lines), places[-1])
        yield error_at(source, at, f"{name}: {error.message}", cause=error.cause, remedy=error.remedy)


def validate_models_at_start(name: str, stage: Any, experiment: Experiment, folder: Path) -> None:
    """When the stage starts. Raises StageError; a hub that can't be reached is told when the model is loaded."""
    for _, error in _wrong(stage, experiment, folder, download=True):
        raise StageError(name, error.message, cause=error.cause, remedy=error.remedy)


def long_notes(experiment: Experiment, folder: Path) -> list[str]:
    """Of models that compute positions (RoPE) and are given more than they were trained on: that works, and is how a
    context is extended, but what they say of tokens that far is seldom good before they have learned it."""
    notes = []
    stage: Any
    for name, stage in experiment.stages.items():
        for _, model, limit, is_table in _limits(stage, experiment, folder, download=False):
            if not is_table and stage.max_length > limit:
                notes.append(
                    f"`{name}` reads up to {stage.max_length:,} tokens (max_length), and `{model_name(model)}` has "
                    f"learned {limit:,} positions (max_position_embeddings): longer rows are computed, but not what it "
                    "was trained on"
                )
    return notes


def _wrong(
    stage: Any, experiment: Experiment, folder: Path, download: bool
) -> Iterator[tuple[tuple[KeyPath, ...], BadModel]]:
    """What is wrong, and the fields that it is about."""
    for path, model, limit, is_table in _limits(stage, experiment, folder, download):
        if is_table and stage.max_length > limit:
            yield (
                (("max_length",), path),
                BadModel(
                    f"`max_length` is {stage.max_length}, and `{model_name(model)}` has positions for {limit} tokens",
                    "its position embeddings are a table, which ends there",
                    f"set `max_length: {limit}` or less, or take a model with more positions",
                ),
            )
    tuner = getattr(stage, "tuner", None)
    if isinstance(tuner, LoraTuner) and not isinstance(tuner.lora.target_modules, str):
        form: Form = "classifier" if isinstance(stage, ClassifierTraining | RewardTraining) else "causal"
        root = root_model(experiment.stages, stage.model)
        built = outline(*_located(root, folder, form)) if _is_here(root, folder, download) else None
        if built is not None:
            try:
                check_target_modules(built, tuner.lora.target_modules, form)
            except BadModel as error:
                yield (("tuner", "lora", "target_modules"),), error


def _limits(
    stage: Any, experiment: Experiment, folder: Path, download: bool
) -> Iterator[tuple[KeyPath, str | Pretrained | Scratch, int, bool]]:
    """Of each model that the stage gives `max_length` tokens to, with its path: tokens, and whether its positions are a
    table. Only those for which `max_length` may be too much."""
    if getattr(stage, "max_length", None) is None:
        return
    seen: list[Root] = []
    for path, model in models_of(stage):
        root = root_model(experiment.stages, model)
        if root in seen or _cuts_by_itself(stage, path):
            continue
        seen.append(root)
        if isinstance(root, Scratch):
            yield path, model, SHAPES[root.scratch].positions, False
            continue
        if not _is_here(root, folder, download):
            continue
        declared = declared_positions(config_of_folder(_config_folder(root, folder)))
        if declared is None or stage.max_length <= declared - MARGIN:
            continue
        built = outline(*_located(root, folder, "body"))
        if built is not None and (limit := position_limit(built)) is not None:
            yield path, model, limit.tokens, limit.is_table


def _cuts_by_itself(stage: Any, path: KeyPath) -> bool:
    """Whether this is a scorer that reads rows as far as its model has positions (models/classifier_inputs.py), in a
    stage that has the default length: another scorer beside it may have more positions, and `tunery filter` can't give
    a length."""
    if not isinstance(stage, Score) or stage.max_length != Score.model_fields["max_length"].default:
        return False
    return isinstance(stage.by[int(path[1])], ClassificationSpec | Embedding)


def _is_here(root: Root, folder: Path, download: bool) -> bool:
    """Whether the config can be read on this machine."""
    if isinstance(root, Scratch):
        return True
    with suppress(OSError, ValueError):  # the hub's errors are of these: no network, no such model, no access
        return (_config_folder(root, folder, download) / "config.json").is_file()
    return False


def _config_folder(root: Pretrained, folder: Path, download: bool = False) -> Path:
    """Where its config.json is. Raises OSError or ValueError where the hub does not give it."""
    if root.is_folder:
        return model_folder(root, folder)
    from huggingface_hub import hf_hub_download

    def found(local_files_only: bool) -> Path:
        revision = root.revision
        return Path(
            hf_hub_download(root.pretrained, "config.json", revision=revision, local_files_only=local_files_only)
        )

    try:
        return found(local_files_only=True).parent
    except OSError:  # without a network the hub is given up after 24 s: what was downloaded needs none
        if not download:
            raise
    return found(local_files_only=False).parent


def _located(root: Root, folder: Path, form: Form) -> tuple[str, Form, str | None]:
    """Arguments of `outline`."""
    if isinstance(root, Scratch):
        return f"scratch:{root.scratch}", form, None
    if root.is_folder:
        return str(model_folder(root, folder)), form, None
    return root.pretrained, form, root.revision
