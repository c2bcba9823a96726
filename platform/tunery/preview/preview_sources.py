"""Rows and tokenizers for a preview, without running the experiment: from the store if they are built, else from the
source file or the pretrained model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

from tunery.errors import RequestError, SpecError, SpecErrors
from tunery.ingest.filesystem import UnavailableFile
from tunery.ingest.read import Quarantined, ReadCounts, as_tables, read_source, source_label
from tunery.ingest.sources import BadSource, resolve_sources, unavailable_source
from tunery.models.encode_rows import InputFormat
from tunery.models.load import Source, load_original_tokenizer, load_tokenizer, source_of, weightless_model_with_head
from tunery.models.meta_model import weightless_model
from tunery.models.model_folder import BadModel, check_model_folder
from tunery.pipeline.cache_keys import fingerprints, model_folder, pretrained_models
from tunery.pipeline.run_context import RunContext
from tunery.pipeline.validate_training import validate_rewards
from tunery.review.decisions import BadDecisions
from tunery.spec import Augment, Dataset, Experiment, Pretrained, Review, Scratch, Select
from tunery.spec.error_messages import error_at
from tunery.spec.graph import lineage, model_chain, root_dataset, with_upstream
from tunery.spec.references import model_name
from tunery.spec.yaml_source import YamlSource
from tunery.store import Artifact
from tunery.store.rows import Row, read_rows, shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedTokenizer:
    tokenizer: PreTrainedTokenizerBase
    origin: str
    """Description of its origin."""
    has_template: bool
    """The model has a chat template; otherwise tunery's default is used."""
    model: PreTrainedModel | None
    """The model without weights, for classifiers and embedding models."""


@dataclass(frozen=True)
class RowStream:
    rows: Iterator[Row]
    origin: str
    """Description of their origin."""
    unusable: list[Quarantined]
    """Unusable records among those read so far."""

    def description(self) -> str:
        """The origin, and the unusable records read so far."""
        if not self.unusable:
            return self.origin
        first = self.unusable[0]
        records = "a record" if len(self.unusable) == 1 else f"{len(self.unusable):,} records"
        return f"{self.origin}; {records} can't be used: {first.source}:{first.line}: {first.reason}"


class PreviewSources:
    """The built artifacts of `stages` and everything upstream. Raises SpecError or SpecErrors if a file, a model folder
    or a review decision is missing."""

    def __init__(self, experiment: Experiment, source: YamlSource, context: RunContext, stages: Iterable[str]) -> None:
        self.experiment, self._source, self.context = experiment, source, context
        self._needed = with_upstream(experiment.stages, stages)

    def find(self, stage: str) -> Artifact | None:
        return self.context.store.find(self.experiment.stages[stage].kind, self._fingerprints[stage])

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        needed = self.experiment.model_copy(update={"stages": self._needed})
        for name, stage in self._needed.items():
            for model in pretrained_models(stage):
                if model.is_folder:
                    try:
                        check_model_folder(model_folder(model, self.context.folder))
                    except BadModel as error:
                        raise self._error(name, "model", error) from None
            if errors := list(validate_rewards(name, stage, self.experiment, self._source, self.context.folder)):
                raise SpecErrors(errors)
            try:
                if isinstance(stage, Dataset):
                    resolve_sources(stage, self.context.folder)
            except BadSource as error:
                raise self._error(name, error.field, error) from None
        try:
            return fingerprints(needed, self.context.folder)
        except BadDecisions as error:
            raise RequestError(error.message, cause=error.cause, remedy=error.remedy) from None

    def _error(self, stage: str, field: str, error: BadSource | BadModel) -> SpecError:
        return error_at(
            self._source, ("stages", stage, field), f"{stage}: {error.message}", cause=error.cause, remedy=error.remedy
        )

    # Rows

    def rows(self, data: str, within: str = "") -> RowStream:
        """Rows of the stage `data`, or of its nearest upstream stage that is built, or of the source file."""
        skipped: list[str] = []
        for name in lineage(self.experiment.stages, data):
            artifact = self.find(name)
            # Only the review's own artifact has the reviewed rows.
            folder = artifact.path / within if artifact is not None and (not within or name == data) else None
            if folder is not None and shards(folder):
                origin = f"rows of `{name}`, from the store{self._not_applied(skipped)}"
                return RowStream(read_rows(folder), origin, [])
            skipped.append(name)
        root = root_dataset(self.experiment.stages, data)
        origin = f"rows of {source_label(root)}, read from the source{self._not_applied(skipped)}"
        unusable: list[Quarantined] = []
        return RowStream(self._read(root, skipped[-1], unusable), origin, unusable)

    def _not_applied(self, stages: list[str]) -> str:
        """Note on the stages that are not built and would change the rows; "" if there are none."""
        effects = []
        for name in reversed(stages):
            stage = self.experiment.stages[name]
            if isinstance(stage, Dataset) and stage.corrupt_fraction:
                effects.append(f"`corrupt_fraction` of `{name}`")
            elif isinstance(stage, Select | Review | Augment):
                effects.append(f"`{name}` ({stage.kind})")
        if not effects:
            return ""
        verbs = "is not applied: it is" if len(effects) == 1 else "are not applied: they are"
        return f"; {', '.join(effects)} {verbs} not built yet"

    def _read(self, root: Dataset, name: str, unusable: list[Quarantined]) -> Iterator[Row]:
        """Yield the usable rows and append the others to `unusable`. Raises SpecError if no row is usable."""
        count = 0
        try:
            for table in _small_tables(read_source(root, self.context.folder, unusable.append)):
                for row in table:
                    count += 1
                    yield row
        except BadSource as error:
            raise self._error(name, error.field, error) from None
        except UnavailableFile as error:
            raise self._error(name, "source", unavailable_source(error)) from None
        if not count:
            cause = "every row is of another split"
            if unusable:
                first = f"{unusable[0].source}:{unusable[0].line}: {unusable[0].reason}"
                cause = f"{len(unusable):,} records can't be used, the first: {first}"
            raise self._error(name, "source", BadSource("source", f"`{source_label(root)}` has no usable row", cause))

    # Tokenizers

    def tokenizer(
        self, models: Iterable[str | Pretrained | Scratch], input_format: InputFormat, embeds: bool
    ) -> LoadedTokenizer:
        """The tokenizer that `models` share, from the first one that is built or derived from a pretrained model.
        Raises RequestError if all are trained from scratch and none is built."""
        candidates = list(models)
        for model in candidates:
            assert not isinstance(model, Scratch), "preview/inputs.py replaces it by the name of its stage"
            if (source := self._source_of(model)) is not None:
                return self._load(*source, input_format, embeds)
        first = candidates[0]
        assert isinstance(first, str), "a pretrained model has a source"
        *_, root_stage, _ = model_chain(self.experiment.stages, first)
        raise RequestError(
            f"the tokenizer of `{first}` isn't built yet",
            cause=f"`{root_stage}` trains a model from scratch, and its tokenizer on its rows",
            remedy=f"run `{self.context.command('run')}` until `{root_stage}` is built, then run this command again",
        )

    def _source_of(self, model: str | Pretrained) -> tuple[Source, str] | None:
        for base in model_chain(self.experiment.stages, model):
            if isinstance(base, str) and (artifact := self.find(base)) is not None:
                return {"artifact": str(artifact.path)}, f"`{base}`, from the store"
            if isinstance(base, Pretrained):
                of = "" if base == model else f", the base of `{model_name(model)}`"
                return source_of(base, {}, self.context.folder), f"{base.pretrained}{of}"
        return None

    def _load(self, source: Source, origin: str, input_format: InputFormat, embeds: bool) -> LoadedTokenizer:
        own = load_original_tokenizer(source)
        if input_format not in ("classifier", "reward_pair"):
            return LoadedTokenizer(load_tokenizer(source), origin, own.chat_template is not None, None)
        # Some architectures of embedding models have no class with a classification head.
        body = embeds and "pretrained" in source
        model = (
            weightless_model(source["pretrained"], "body", source["revision"])
            if body
            else weightless_model_with_head(source, ("",))
        )
        if model is None:
            raise RequestError(
                f"the config.json of `{source['pretrained']}` can't be used", remedy="download the model"
            )
        return LoadedTokenizer(own, origin, own.chat_template is not None, model)


def _small_tables(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Convert rows to the artifacts' schema with ids, in small batches, because a preview reads few rows."""
    while batch := list(islice(rows, 16)):
        for table in as_tables(iter(batch), ReadCounts()):
            yield table.to_pylist()
