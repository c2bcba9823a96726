"""Checks of an `augment` stage before a run: its rows have questions to rewrite, its few-shot examples have responses,
and evaluation data of the experiment cannot leak into its rows unless it is listed in `heldout`.

Two stages are assumed to share rows if both are derived from overlapping splits of the same file, hub dataset or
builtin corpus. Duplicate rows in different files are not detected, which would require reading all rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from tunery.errors import SpecError
from tunery.ingest.filesystem import File
from tunery.ingest.formats.hub import HubDataset
from tunery.ingest.read import first_row_format, source_label
from tunery.ingest.sources import BadSource, Builtin, SourcePart, resolve_sources
from tunery.spec import Augment, Dataset, Experiment, Review, Training
from tunery.spec.error_messages import error_at
from tunery.spec.graph import lineage, root_dataset
from tunery.spec.trainings import data_refs
from tunery.spec.yaml_source import Path as KeyPath
from tunery.spec.yaml_source import YamlSource


def validate_augment(
    name: str, stage: Augment, experiment: Experiment, source: YamlSource, folder: Path
) -> Iterator[SpecError]:
    """Yield the errors of an augment stage. `folder`: the folder of the experiment file."""
    try:
        yield from _check_shapes(name, stage, experiment, source, folder)
        yield from _check_heldout(name, stage, experiment, source, folder)
    except BadSource:  # reported for the dataset
        return


def _check_shapes(
    name: str, stage: Augment, experiment: Experiment, source: YamlSource, folder: Path
) -> Iterator[SpecError]:
    at: KeyPath = ("stages", name)
    data = root_dataset(experiment.stages, stage.data)
    shape = first_row_format(data, folder)
    if shape == "text":
        yield error_at(
            source,
            (*at, "data"),
            f"`{name}.data` needs conversations or prompts, but `{source_label(data)}` has texts",
            cause="a text has no question to rewrite",
            remedy="use rows with questions",
        )
        return
    if stage.few_shot is not None and stage.few_shot.counts[-1]:
        given = stage.few_shot.examples
        examples = root_dataset(experiment.stages, given or stage.data)
        shape = first_row_format(examples, folder)
        if shape in ("text", "prompt"):
            yield error_at(
                source,
                (*at, "few_shot", "examples") if given else (*at, "few_shot"),
                f"`{name}.few_shot` needs examples with responses, but `{source_label(examples)}` has {shape}s",
                cause="" if given else f"no stage is named in `examples`, so they are the rows of `{stage.data}`",
                remedy="name a stage with questions and responses in `examples`",
            )


def _check_heldout(
    name: str, stage: Augment, experiment: Experiment, source: YamlSource, folder: Path
) -> Iterator[SpecError]:
    is_evaluation_data = _is_evaluation_data(name, experiment)
    uses: list[tuple[str, str, str]] = []
    if not is_evaluation_data:
        uses.append(("heldout", stage.data, "evaluate on rows that it does not output, such as another split"))
    if stage.few_shot is not None:
        examples = stage.few_shot.examples or stage.data
        uses.append(("few_shot", examples, "name other rows in `few_shot.examples`, such as another split"))
    named, reported = set(stage.heldout), set[str]()
    # Shortest lineage first: if a dataset is held out, so are the stages derived from it.
    for evaluated, field_path in sorted(
        _evaluation_stages(experiment), key=lambda item: len(lineage(experiment.stages, item[0]))
    ):
        line = lineage(experiment.stages, evaluated)
        if _covering(line, experiment) & named:
            continue
        for field, used, otherwise in uses:
            shared = _shared(root_dataset(experiment.stages, used), root_dataset(experiment.stages, evaluated), folder)
            remedy = f"name `{evaluated}` in `{name}.heldout`, or give them splits that don't overlap"
            if is_evaluation_data or name in line:
                remedy = otherwise
            if shared and remedy not in reported:
                named.add(evaluated)
                reported.add(remedy)
                yield error_at(
                    source,
                    ("stages", name, field),
                    f"evaluation rows of `{field_path}` can get into `{name}`, from `{used}`",
                    cause=f"`{evaluated}` and `{used}` both read {shared}",
                    remedy=remedy,
                )
                break


def _is_evaluation_data(name: str, experiment: Experiment) -> bool:
    """Whether the rows of the stage are used for evaluation and not for training. Such rows may come from held-out
    data; only their few-shot examples must not."""
    stages = experiment.stages
    trainings = [stage for stage in stages.values() if isinstance(stage, Training)]
    lines = [lineage(stages, data) for stage in trainings for data in data_refs(stage.data).values()]
    evaluates = any(name in lineage(stages, other) for other, _ in _evaluation_stages(experiment))
    return evaluates and not any(name in line for line in lines)


def _covering(line: Sequence[str], experiment: Experiment) -> set[str]:
    """Return the stages of a lineage that contain all groups of its first stage. The groups of each stage are a subset
    of those of its input, except for a review, which can restore rows that its select stage dropped."""
    reviewed = {stage.data for name in line if isinstance(stage := experiment.stages[name], Review)}
    return set(line) - (reviewed - {line[0]})


def _evaluation_stages(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Yield each stage whose rows a loss or a win rate is computed on, with the first field that refers to it."""
    found: dict[str, str] = {}
    for name, stage in experiment.stages.items():
        for item in stage.eval_refs():
            found.setdefault(item.stage, ".".join(map(str, (name, *item.path))))
    yield from found.items()


def _shared(one: Dataset, other: Dataset, folder: Path) -> str:
    """Return a description of the source that both datasets read and of their splits; "" if they cannot share a group.
    Raises BadSource."""
    if not _overlap(one, other):
        return ""
    parts = resolve_sources(other, folder)
    known = {_path(part) for part in parts if isinstance(part, File)}
    splits = one.split if one.split == other.split else f"{other.split} and {one.split}"
    for part in resolve_sources(one, folder):
        if _path(part) in known if isinstance(part, File) else any(_same(part, seen) for seen in parts):
            return f"`{part.name}` (split {splits})"
    return ""


def _path(file: File) -> str:
    """Return an identifier of the file that does not depend on how its path is written."""
    return file.name if file.is_remote else os.path.realpath(file.path)


def _same(one: Builtin | HubDataset, other: SourcePart) -> bool:
    """Whether two sources can share rows. All subsets of the builtin corpora can, since they are about the same
    objects. A hub config or split that is not set matches any."""
    if isinstance(one, HubDataset) and isinstance(other, HubDataset):
        named = ((one.config, other.config), (one.split, other.split))
        return one.name == other.name and all(a == b or None in (a, b) for a, b in named)
    return isinstance(one, Builtin) and isinstance(other, Builtin)


def _overlap(one: Dataset, other: Dataset) -> bool:
    """Whether a group can be in both splits. A train split and an evaluation split overlap only if the latter has the
    larger `eval_fraction`: increasing it only moves groups out of train."""
    if "all" in (one.split, other.split) or one.split == other.split:
        return True
    if one.split == "train":
        return other.eval_fraction > one.eval_fraction
    return other.split == "train" and one.eval_fraction > other.eval_fraction
