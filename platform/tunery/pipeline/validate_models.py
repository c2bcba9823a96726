"""Checks of a stage against the configs of its models: the models have positions for `max_length` tokens, and the
layers in `target_modules` exist.

A model that a stage trains has the architecture of the model at the root of its chain: a folder, a hub name, or a
scratch model. Before a run the checks do not use the network. A hub model whose config is not in the local cache is
checked when the stage starts, before its workers start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunery.errors import SpecError, StageError
from tunery.models.meta_model import (
    MAX_EXTRA_POSITIONS,
    ModelForm,
    check_target_modules,
    config_of_folder,
    declared_positions,
    position_limit,
    weightless_model,
)
from tunery.models.model_folder import BadModel
from tunery.models.scratch import SHAPES
from tunery.pipeline.cache_keys import model_folder, models_of
from tunery.spec import (
    TRAINERS,
    Experiment,
    Pretrained,
    Score,
    Scratch,
    Training,
    adapter_spec,
    settings_of,
    tuner_of,
)
from tunery.spec.error_messages import error_at
from tunery.spec.graph import Root, root_model
from tunery.spec.references import model_name
from tunery.spec.scorers import SCORERS
from tunery.spec.yaml_source import Path as KeyPath
from tunery.spec.yaml_source import YamlSource


def validate_models(
    name: str, stage: Any, experiment: Experiment, source: YamlSource, folder: Path
) -> Iterator[SpecError]:
    """Yield the errors of a stage before a run. Does not use the network."""
    for paths, error in _model_errors(stage, experiment, folder, download=False):
        # A field with its default value has no line in the file; the error is then reported at the model.
        keys = [("stages", name, *path) for path in paths]
        at = next((key for key in keys if key in source.lines), keys[-1])
        yield error_at(source, at, f"{name}: {error.message}", cause=error.cause, remedy=error.remedy)


def validate_models_at_start(name: str, stage: Any, experiment: Experiment, folder: Path) -> None:
    """Check a stage when it starts. Raises StageError. If the hub cannot be reached, the check is skipped, and loading
    the model reports that."""
    for _, error in _model_errors(stage, experiment, folder, download=True):
        raise StageError(name, error.message, cause=error.cause, remedy=error.remedy)


def position_notes(experiment: Experiment, folder: Path) -> list[str]:
    """Return notes on stages whose `max_length` exceeds the positions that a model was trained on, for models that
    compute positions (RoPE). This is valid, and is how a context is extended, but predictions at such positions are
    usually poor until the model has been trained on them."""
    notes = []
    stage: Any
    for name, stage in experiment.stages.items():
        for _, model, limit, is_learned in _limits(stage, experiment, folder, download=False):
            if not is_learned and stage.max_length > limit:
                notes.append(
                    f"`{name}` reads up to {stage.max_length:,} tokens (max_length), and `{model_name(model)}` was "
                    f"trained on {limit:,} positions (max_position_embeddings): longer rows are allowed, but expect "
                    "poor predictions"
                )
    return notes


def _model_errors(
    stage: Any, experiment: Experiment, folder: Path, download: bool
) -> Iterator[tuple[tuple[KeyPath, ...], BadModel]]:
    """Yield each error with the fields that it concerns."""
    for path, model, limit, is_learned in _limits(stage, experiment, folder, download):
        if is_learned and stage.max_length > limit:
            yield (
                (("max_length",), path),
                BadModel(
                    f"`max_length` is {stage.max_length}, and `{model_name(model)}` has positions for {limit} tokens",
                    "its position embeddings are a table of this size",
                    f"set `max_length: {limit}` or less, or use a model with more positions",
                ),
            )
    if not isinstance(stage, Training):
        return
    tuner = tuner_of(stage)
    adapter = adapter_spec(tuner)
    if not adapter.mergeable:
        yield (
            (("tuner",),),
            BadModel(
                f"`tuner: {adapter.kind}` can't be used",
                f"the adapter of {adapter.title} can't be merged into its base, as loading a trained model requires",
                "take another `tuner`",
            ),
        )
    if targets := adapter.target_modules(settings_of(tuner)):
        form: ModelForm = TRAINERS[stage.kind].model_form
        root = root_model(experiment.stages, stage.model)
        built = weightless_model(*_weightless_args(root, folder, form)) if _is_local(root, folder, download) else None
        if built is not None:
            try:
                check_target_modules(built, targets, form)
            except BadModel as error:
                yield (("tuner", adapter.kind, "target_modules"),), error


def _limits(
    stage: Any, experiment: Experiment, folder: Path, download: bool
) -> Iterator[tuple[KeyPath, str | Pretrained | Scratch, int, bool]]:
    """Yield (path, model, maximum number of tokens, whether its position embeddings are a table) for each distinct
    model that reads sequences of `max_length` tokens. Models with more positions than that may be omitted."""
    if getattr(stage, "max_length", None) is None:
        return
    seen: list[Root] = []
    for path, model in models_of(stage):
        root = root_model(experiment.stages, model)
        if root in seen or _truncates_to_positions(stage, path):
            continue
        seen.append(root)
        if isinstance(root, Scratch):
            yield path, model, SHAPES[root.scratch].positions, False
            continue
        if not _is_local(root, folder, download):
            continue
        declared = declared_positions(config_of_folder(_config_folder(root, folder)))
        if declared is None or stage.max_length <= declared - MAX_EXTRA_POSITIONS:
            continue
        built = weightless_model(*_weightless_args(root, folder, "body"))
        if built is not None and (limit := position_limit(built)) is not None:
            yield path, model, limit.tokens, limit.is_learned


def _truncates_to_positions(stage: Any, path: KeyPath) -> bool:
    """Whether this is a scorer that truncates rows to the positions of its model (models/classifier_inputs.py), in a
    stage with the default `max_length`. That default is not an error: other scorers of the stage may have more
    positions, and `tunery filter` cannot set a length."""
    if not isinstance(stage, Score) or stage.max_length != Score.model_fields["max_length"].default:
        return False
    return SCORERS[stage.by[int(path[1])].kind()].input_kind in ("classification", "embedding")


def _is_local(root: Root, folder: Path, download: bool) -> bool:
    """Whether the config can be read on this machine."""
    if isinstance(root, Scratch):
        return True
    with suppress(OSError, ValueError):  # errors of the hub: no network, unknown model, no access
        return (_config_folder(root, folder, download) / "config.json").is_file()
    return False


def _config_folder(root: Pretrained, folder: Path, download: bool = False) -> Path:
    """Return the folder of the model's config.json. Raises OSError or ValueError if the hub does not provide it."""
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
    except OSError:  # the cache is tried first: without a network, a request to the hub fails only after 24 s
        if not download:
            raise
    return found(local_files_only=False).parent


def _weightless_args(root: Root, folder: Path, form: ModelForm) -> tuple[str, ModelForm, str | None]:
    """Return the arguments of `weightless_model` for a root model."""
    if isinstance(root, Scratch):
        return f"scratch:{root.scratch}", form, None
    if root.is_folder:
        return str(model_folder(root, folder)), form, None
    return root.pretrained, form, root.revision
