"""Registries of kinds (scorers, adapters, stages): the builtin entries and those of installed plugins.

A plugin is a distribution with an entry point of the group `tunery.plugins` that refers to a `Plugin`:

    [project.entry-points."tunery.plugins"]
    toy = "toy_plugin:PLUGIN"

Entry points are read on first use of a registry, in every process, so that Ray workers have the same kinds.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar, Union, cast

from pydantic import Discriminator, GetCoreSchemaHandler, Tag
from pydantic_core import CoreSchema

from tunery.errors import RequestError

GROUP = "tunery.plugins"


def load_object(reference: str) -> Any:
    """Import what "module:name" refers to."""
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


class RegistryEntry(Protocol):
    @property
    def kind(self) -> str:
        """The name that an experiment uses."""
        ...


@dataclass(frozen=True)
class Plugin:
    """What a distribution adds to tunery."""

    scorers: tuple[RegistryEntry, ...] = ()
    """ScorerEntry objects."""
    adapters: tuple[RegistryEntry, ...] = ()
    """AdapterSpec objects."""
    stages: tuple[RegistryEntry, ...] = ()
    """StageKind objects; a trainer is a TrainerSpec."""


@functools.cache
def installed_plugins() -> tuple[tuple[str, Plugin], ...]:
    """Return (name of the distribution, plugin) of each entry point. Raises RequestError for one that is unusable."""
    return tuple((_distribution(point), _load_plugin(point)) for point in entry_points(group=GROUP))


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def _load_plugin(point: EntryPoint) -> Plugin:
    name = _distribution(point)
    try:
        plugin = point.load()
    except Exception as error:  # importing a plugin runs its code, which may raise anything
        raise RequestError(
            f"the plugin `{name}` can't be imported: {point.value}",
            cause=f"{type(error).__name__}: {error}",
            remedy=f"install a working version of {name}, or remove it: pip uninstall {name}",
        ) from error
    if not isinstance(plugin, Plugin):
        raise RequestError(
            f"the plugin `{name}` is unusable: {point.value} is a {type(plugin).__name__}",
            cause=f"an entry point of the group `{GROUP}` refers to a tunery.spec.plugins.Plugin",
            remedy=f"install a working version of {name}, or remove it: pip uninstall {name}",
        )
    return plugin


Entry = TypeVar("Entry", bound=RegistryEntry)


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Read-only mapping from the name of a kind to its entry: the builtin ones in order, then those of plugins.

    Plugins are imported on first access, and a plugin imports tunery.spec: nothing may access a registry while
    tunery.spec is being imported.
    """

    def __init__(
        self, field: Literal["scorers", "adapters", "stages"], entry_type: type[Entry], builtin: Iterable[Entry]
    ) -> None:
        self._field, self._entry_type, self._builtin = field, entry_type, tuple(builtin)

    @functools.cached_property
    def _entries(self) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        owners: dict[str, str] = {}
        for owner, entry in self._owned_entries():
            if not isinstance(entry, self._entry_type):
                raise RequestError(
                    f"the plugin `{owner}` is unusable: its `{self._field}` hold a {type(entry).__name__}",
                    cause=f"`{self._field}` of a Plugin hold {self._entry_type.__name__} objects",
                    remedy=f"install a working version of {owner}, or remove it: pip uninstall {owner}",
                )
            if entry.kind in entries:
                raise RequestError(
                    f"`{entry.kind}` is registered twice among the {self._field}: "
                    f"by {owners[entry.kind]} and by {owner}",
                    cause="an experiment selects a kind by its name, so each name has one owner",
                    remedy=f"rename the kind in {owner}, or remove the plugin: pip uninstall {owner}",
                )
            entries[entry.kind], owners[entry.kind] = entry, owner
        return entries

    def _owned_entries(self) -> Iterator[tuple[str, Entry]]:
        for entry in self._builtin:
            yield "tunery", entry
        for owner, plugin in installed_plugins():
            for entry in getattr(plugin, self._field):
                yield owner, cast(Entry, entry)

    def __getitem__(self, kind: str) -> Entry:
        return self._entries[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(frozen=True)
class KindUnion:
    """Annotation of a field whose type is a union over a registry: `Annotated[Base, KindUnion(members, tag)]`.

    The union is built with the schema of the model that has the field, so `Config` defers schemas to the first
    validation, after all of tunery.spec is imported.
    """

    members: Callable[[], Mapping[str, Any]]
    """Returns the type of each kind by its tag."""
    tag: Callable[[Any], str] | str
    """Returns the tag of a value, or is the key whose value is the tag. pydantic puts the tag into the location of an
    error."""

    def union(self) -> Any:
        """Return the union with the tags as metadata."""
        tagged = tuple(Annotated[member, Tag(tag)] for tag, member in self.members().items())
        return Annotated[Union[tagged], Discriminator(self.tag)]  # noqa: UP007  # a union of a computed tuple

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler.generate_schema(self.union())
