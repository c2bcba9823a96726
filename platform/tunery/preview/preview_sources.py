"""What a preview reads without running the experiment: rows and tokenizers, from the store where they are built
already, else from the file or the model at the root."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING

from tunery.errors import RequestError, SpecError, SpecErrors
from tunery.ingest.filesystem import UnavailableFile
from tunery.ingest.read import Quarantined, ReadCounts, as_tables, read_source, source_label
from tunery.ingest.sources import BadSource, find_parts, out_of_reach
from tunery.models.load import Source, load_own_tokenizer, load_tokenizer, outline_with_head, source_of
from tunery.models.meta_model import outline
from tunery.models.model_folder import BadModel, check_model_folder
from tunery.models.preview import InputFormat
from tunery.pipeline.cache_keys import fingerprints, model_folder, pretrained_models
from tunery.pipeline.execute import RunContext
from tunery.pipeline.validate_training import root_of, validate_rewards
from tunery.review.decisions import BadDecisions
from tunery.spec import Augment, Dataset, Experiment, Pretrained, Review, Scratch, Select
from tunery.spec.error_messages import error_at
from tunery.spec.graph import lineage, model_chain, with_upstream
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
    """Where it is from, for people."""
    has_template: bool
    """The model brings a chat template; else it is tunery's own."""
    model: PreTrainedModel | None
    """Without weights; of classifiers and embedding models."""


@dataclass(frozen=True)
class RowStream:
    rows: Iterator[Row]
    origin: str
    """Where they are from, in a sentence."""
    unusable: list[Quarantined]
    """Records that can't be used, of those that have been read."""

    def described(self) -> str:
        """The origin, and what could not be used so far."""
        if not self.unusable:
            return self.origin
        first = self.unusable[0]
        can = "a record" if len(self.unusable) == 1 else f"{len(self.unusable):,} records"
        return f"{self.origin}; {can} can't be used: {first.source}:{first.line}: {first.reason}"


class PreviewSources:
    """What is built of the stages that `wanted` go back to. Raises SpecError (and SpecErrors) where a file, a model
    folder or a decision that one of them names is missing."""

    def __init__(self, experiment: Experiment, source: YamlSource, where: RunContext, wanted: Iterable[str]) -> None:
        self.experiment, self._source, self.where = experiment, source, where
        self._needed = with_upstream(experiment.stages, wanted)

    def find(self, stage: str) -> Artifact | None:
        return self.where.store.find(self.experiment.stages[stage].kind, self._fingerprints[stage])

    @cached_property
    def _fingerprints(self) -> dict[str, str]:
        needed = self.experiment.model_copy(update={"stages": self._needed})
        for name, stage in self._needed.items():
            for model in pretrained_models(stage):
                if model.is_folder:
                    try:
                        check_model_folder(model_folder(model, self.where.folder))
                    except BadModel as error:
                        raise self._error(name, "model", error) from None
            if errors := list(validate_rewards(name, stage, self.experiment, self._source, self.where.folder)):
                raise SpecErrors(errors)
            try:
                if isinstance(stage, Dataset):
                    find_parts(stage, self.where.folder)
            except BadSource as error:
                raise self._error(name, error.field, error) from None
        try:
            return {name: found[0] for name, found in fingerprints(needed, self.where.folder).items()}
        except BadDecisions as error:
            raise RequestError(error.message, cause=error.cause, remedy=error.remedy) from None

    def _error(self, stage: str, field: str, error: BadSource | BadModel) -> SpecError:
        return error_at(
            self._source, ("stages", stage, field), f"{stage}: {error.message}", cause=error.cause, remedy=error.remedy
        )

    # Rows

    def rows(self, data: str, within: str = "") -> RowStream:
        """Rows of the stage `data`, as far as they are built."""
        skipped: list[str] = []
        for name in lineage(self.experiment.stages, data):
            artifact = self.find(name)
            # A review's decided rows are in its own artifact alone.
            folder = artifact.path / within if artifact is not None and (not within or name == data) else None
            if folder is not None and shards(folder):
                said = f"rows of `{name}`, from the store{self._not_applied(skipped)}"
                return RowStream(read_rows(folder), said, [])
            skipped.append(name)
        root = root_of(self.experiment, data)
        said = f"rows of {source_label(root)}, read from the source{self._not_applied(skipped)}"
        bad: list[Quarantined] = []
        return RowStream(self._read(root, skipped[-1], bad), said, bad)

    def _not_applied(self, stages: list[str]) -> str:
        """What the stages that are not built would do to the rows."""
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

    def _read(self, root: Dataset, name: str, bad: list[Quarantined]) -> Iterator[Row]:
        """Without those that can't be read. Raises SpecError where nothing can."""
        count = 0
        try:
            for table in _small_tables(read_source(root, self.where.folder, bad.append)):
                for row in table:
                    count += 1
                    yield row
        except BadSource as error:
            raise self._error(name, error.field, error) from None
        except UnavailableFile as error:
            raise self._error(name, "source", out_of_reach(error)) from None
        if not count:
            first = f"{bad[0].source}:{bad[0].line}: {bad[0].reason}" if bad else "every row is of another split"
            cause = f"{len(bad):,} records can't be used, the first: {first}" if bad else first
            raise self._error(name, "source", BadSource("source", f"`{source_label(root)}` gives no row", cause))

    # Tokenizers

    def tokenizer(
        self, models: Iterable[str | Pretrained | Scratch], input_format: InputFormat, embeds: bool
    ) -> LoadedTokenizer:
        """That of the first of `models` (which have the same one) that is built, or goes back to a pretrained model.
        Raises RequestError where all begin from scratch and none is built."""
        names = list(models)
        for model in names:
            assert not isinstance(model, Scratch), "preview/inputs.py names the stage in its place"
            if (found := self._source_of(model)) is not None:
                return self._load(*found, input_format, embeds)
        first = names[0]
        assert isinstance(first, str), "only stages begin from scratch"
        *_, begun, _ = model_chain(self.experiment.stages, first)
        raise RequestError(
            f"the tokenizer of `{first}` isn't built yet",
            cause=f"`{begun}` begins from scratch: its tokenizer is trained on its rows when it runs",
            remedy=f"run `{self.where.command('run')}` until `{begun}` is built, then give this command again",
        )

    def _source_of(self, model: str | Pretrained) -> tuple[Source, str] | None:
        for base in model_chain(self.experiment.stages, model):
            if isinstance(base, str) and (artifact := self.find(base)) is not None:
                return {"artifact": str(artifact.path)}, f"`{base}`, from the store"
            if isinstance(base, Pretrained):
                of = "" if base == model else f", the base of `{model_name(model)}`"
                return source_of(base, {}, self.where.folder), f"{base.pretrained}{of}"
        return None

    def _load(self, source: Source, origin: str, input_format: InputFormat, embeds: bool) -> LoadedTokenizer:
        own = load_own_tokenizer(source)
        if input_format not in ("classifier", "reward_pair"):
            return LoadedTokenizer(load_tokenizer(source), origin, own.chat_template is not None, None)
        # Not every architecture of an embedding model has a classifier.
        body = embeds and "pretrained" in source
        model = outline(source["pretrained"], "body", source["revision"]) if body else outline_with_head(source, ("",))
        if model is None:
            raise RequestError(
                f"the config.json of `{source['pretrained']}` can't be used", remedy="download the model"
            )
        return LoadedTokenizer(own, origin, own.chat_template is not None, model)


def _small_tables(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """In the schema and with their ids, as an artifact has them; few at a time, because few are looked at."""
    while some := list(islice(rows, 16)):
        for table in as_tables(iter(some), ReadCounts()):
            yield table.to_pylist()
