"""From a file to a checked experiment: every error names the file, the line, the value, the cause and the remedy.

`load` checks what can be known from the text alone: schema, references, cycles, which stage may feed which, and the
search space with every choice put in. Files and models that the experiment names are checked by `runner.check`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import Tag, ValidationError
from pydantic_core import ErrorDetails

from tunery.errors import RequestError, SpecError, SpecErrors
from tunery.spec import graph
from tunery.spec.experiment import Experiment
from tunery.spec.overrides import PathError, with_overrides
from tunery.spec.reference import ROWS, Spec, model_name
from tunery.spec.scorers import SCORERS
from tunery.spec.search import Search
from tunery.spec.stages import RANDOM, Evaluate, Review, Score, Select, Stage, WinRate
from tunery.spec.trainings import Training
from tunery.spec.yaml_source import Path as KeyPath
from tunery.spec.yaml_source import YamlSource, read_yaml

METRICS_OF_EVALUATE = ("loss", "perplexity")
METRICS_OF_WIN_RATE = ("win_rate", "reward")
_FROM_OUTSIDE = "none; write {pretrained: <folder or hub name>}"


def load(path: Path) -> tuple[Experiment, YamlSource]:
    """The experiment in `path`. Raises RequestError when it can't be read, SpecErrors when it is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(f"there is no file {path}", remedy="give the path of an experiment, a .yaml file") from None
    except IsADirectoryError:
        raise RequestError(f"{path} is a folder", remedy="give the path of an experiment, a .yaml file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} can't be read: {error}", remedy="an experiment is a UTF-8 text file") from None
    source = read_yaml(text, str(path))
    return parse(source), source


def parse(source: YamlSource) -> Experiment:
    """Check `source` and build the experiment. Raises SpecErrors with all that is wrong on its level."""
    if not isinstance(source.data, dict):
        found = "is empty" if source.data is None else f"holds {_kind_of(source.data)}"
        remedy = "an experiment is a mapping with name, seed and stages"
        raise SpecErrors([SpecError(f"the file {found}", file=source.file, line=1, remedy=remedy)])
    try:
        experiment = Experiment.model_validate_json(json.dumps(source.data), strict=True)
    except ValidationError as error:
        raise SpecErrors(_translate_all(error.errors(), source)) from None
    for check in (_check_references, _check_scores, _check_search):
        if errors := list(check(experiment, source)):
            raise SpecErrors(errors)
    return experiment


def error_at(source: YamlSource, path: KeyPath, message: str, *, cause: str = "", remedy: str = "") -> SpecError:
    return SpecError(message, file=source.file, line=source.line(path), cause=cause, remedy=remedy)


def nearest(word: str, known: Iterable[str]) -> str:
    """A remedy: the known word that was probably meant, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(names) or 'none'}"


def _check_references(experiment: Experiment, source: YamlSource) -> Iterable[SpecError]:
    stages = experiment.stages
    for name, stage in stages.items():
        path: KeyPath = ("stages", name)
        if not name.replace("_", "").isalnum() or not name[0].isalpha():
            yield error_at(
                source, path, f"`{name}` is no stage's name", remedy="use letters, digits and _, with a letter first"
            )
        for item in stage.inputs():
            at = (*path, *item.path)
            field = ".".join(map(str, (name, *item.path)))
            if item.stage not in stages:
                yield error_at(
                    source,
                    at,
                    f"`{field}` refers to stage `{item.stage}`, which isn't there",
                    remedy=nearest(item.stage, (other for other in stages if other != name)),
                )
            elif stages[item.stage].gives not in item.wants:
                fitting = [other for other, stage in stages.items() if stage.gives in item.wants and other != name]
                # Models may come from outside the experiment, rows may not.
                otherwise = "none; add one" if set(item.wants) & set(ROWS) else _FROM_OUTSIDE
                yield error_at(
                    source,
                    at,
                    f"`{field}` needs {_wanted(item.wants)}, but `{item.stage}` is a {stages[item.stage].kind} stage",
                    cause=f"a {stages[item.stage].kind} stage gives {_wanted((stages[item.stage].gives,))}",
                    remedy=f"stages that fit: {', '.join(fitting) or otherwise}",
                )
    if cycle := graph.find_cycle(stages):
        yield error_at(
            source,
            ("stages", cycle[0]),
            f"the stages form a cycle: {' -> '.join(cycle)}",
            cause="each of them waits for the next",
            remedy="let one of them read an earlier stage",
        )


def _wanted(gives: tuple[str, ...]) -> str:
    words = {
        "rows": "rows",
        "scored": "scored rows",
        "selected": "selected rows",
        "model": "a model",
        "classifier": "a reward model or classifier",
        "metrics": "metrics",
    }
    # Whoever takes rows takes a selection's too: nobody has to be told.
    return " or ".join(words[give] for give in gives if give != "selected" or "rows" not in gives)


def _check_scores(experiment: Experiment, source: YamlSource) -> Iterable[SpecError]:
    for name, stage in experiment.stages.items():
        if isinstance(stage, Review):
            selection = experiment.stages[stage.data]
            if isinstance(selection, Select) and not selection.keep:
                yield error_at(
                    source,
                    ("stages", name, "data"),
                    f"`{name}` asks about rows near a cut, and `{stage.data}` has none",
                    cause="it keeps rows by how alike they are, or so many of each source",
                    remedy="name a select stage with a rule in `keep`",
                )
        if isinstance(stage, Select):
            yield from _check_scores_of(name, stage, experiment, source)


def _check_scores_of(name: str, stage: Select, experiment: Experiment, source: YamlSource) -> Iterable[SpecError]:
    """Each score that is named is made by the data, and each vector kept."""
    scored = experiment.stages[stage.data]
    scorers = scored.by if isinstance(scored, Score) else ()
    made = [scorer.score for scorer in scorers if not scorer.gives_vectors]
    vectors = [scorer.score for scorer in scorers if scorer.gives_vectors]
    used: list[tuple[KeyPath, str]] = [(("keep", score), score) for score in stage.keep]
    if stage.quota is not None and stage.quota.by is not None:
        used.append((("quota", "by"), stage.quota.by))
    if stage.diverse is not None and stage.diverse.score is not None:
        used.append((("diverse", "score"), stage.diverse.score))
    for path, score in used:
        at = ("stages", name, *path)
        if score in vectors:
            yield error_at(
                source,
                at,
                f"`{name}.{path[0]}` uses the score `{score}`, which is none",
                cause=f"without `near` an embedding gives each row a vector, for `{name}.diverse.by`",
                remedy=f"give it `near` in `{stage.data}`, or name another: {', '.join([*made, RANDOM])}",
            )
        elif score not in (*made, RANDOM):
            yield error_at(
                source,
                at,
                f"`{name}.{path[0]}` uses the score `{score}`, which `{stage.data}` does not make",
                cause="" if made else f"`{stage.data}` is a {scored.kind} stage, which makes no scores",
                remedy=nearest(score, [*made, RANDOM]),
            )
    if stage.diverse is not None and stage.diverse.by not in vectors:
        by = stage.diverse.by
        cause = f"it is a {scored.kind} stage" if not scorers else "only an embedding without `near` keeps some"
        yield error_at(
            source,
            ("stages", name, "diverse", "by"),
            f"`{name}.diverse` compares rows by `{by}`, of which `{stage.data}` keeps no vectors",
            cause=cause,
            remedy=nearest(by, vectors) if vectors else "let a score stage keep them: `by: [{embedding: <model>}]`",
        )


def metrics_of(experiment: Experiment) -> list[str]:
    """Every metric that a search can aim at."""
    names: list[str] = []
    for name, stage in experiment.stages.items():
        if isinstance(stage, Training) and stage.eval_data is not None:
            names += [f"{name}.{metric}" for metric in stage.metrics]
        if isinstance(stage, Evaluate):
            sets = [(model_name(model), data) for model in stage.models for data in stage.data]
            names += [f"{name}.{model}.{data}.{metric}" for model, data in sets for metric in METRICS_OF_EVALUATE]
            if stage.baseline is not None:
                before = model_name(stage.baseline)
                names += [f"{name}.{model}.{data}.forgetting" for model, data in sets if model != before]
        if isinstance(stage, WinRate):
            models = [model_name(model) for model in stage.models]
            names += [f"{name}.{model}.{stage.data}.{metric}" for model in models for metric in METRICS_OF_WIN_RATE]
    return names


def _check_search(experiment: Experiment, source: YamlSource) -> Iterable[SpecError]:
    search = experiment.search
    if search is None:
        return
    known = metrics_of(experiment)
    if search.metric not in known:
        cause = "" if known else "no stage logs one: give a training `eval_data`, or add an evaluate stage"
        remedy = nearest(search.metric, known)
        yield error_at(source, ("search", "metric"), f"nobody logs `{search.metric}`", cause=cause, remedy=remedy)
        return
    metric_stage = search.metric.split(".")[0]
    while_training = [name for name in known if name.count(".") == 1]
    if search.scheduler == "asha" and search.metric not in while_training:
        yield error_at(
            source,
            ("search", "scheduler"),
            f"asha can't stop trials early by `{search.metric}`",
            cause="that is measured once, after the training",
            remedy=f"aim at one of: {', '.join(while_training)}"
            if while_training
            else "use `scheduler: none`, or give a training `eval_data` and aim at its eval_loss",
        )
    if search.algorithm == "grid":
        yield from _check_grid(search, source)
    reached = graph.closure(experiment.stages, [metric_stage])
    for path, dimension in search.space.items():
        at: KeyPath = ("search", "space", path)
        for value in dimension.values:
            try:
                trial = with_overrides(experiment, {path: value})
            except PathError as error:
                yield error_at(source, at, f"no field has the search path {error}", remedy=error.remedy)
                break
            except ValidationError as error:
                yield error_at(
                    source,
                    at,
                    f"`{path}` can't be {value!r}",
                    cause=_sentence(error.errors()[0]),
                    remedy="change the dimension so that every value fits the field",
                )
                break
            if errors := list(_check_references(trial, source)) or list(_check_scores(trial, source)):
                yield error_at(
                    source, at, f"`{path}` can't be {value!r}", cause=errors[0].message, remedy=errors[0].remedy
                )
                break
        else:
            if path.split(".")[0] not in reached:
                yield error_at(
                    source,
                    at,
                    f"`{path}` can't change `{search.metric}`",
                    cause=f"`{metric_stage}` does not depend on `{path.split('.')[0]}`",
                    remedy=f"search fields of: {', '.join(reached)}",
                )


def _check_grid(search: Search, source: YamlSource) -> Iterable[SpecError]:
    combinations = 1
    for path, dimension in search.space.items():
        if dimension.choice is None:
            yield error_at(
                source,
                ("search", "space", path),
                f"a grid needs `choice` dimensions, `{path}` is {dimension.describe()}",
                remedy="list the values, or use `algorithm: random`",
            )
        else:
            combinations *= len(dimension.choice)
    if combinations > search.trials:
        yield error_at(
            source,
            ("search", "trials"),
            f"the grid has {combinations} combinations, but `trials` is {search.trials}",
            remedy=f"set `trials: {combinations}`, or use `algorithm: random`",
        )


# From pydantic's errors to ours.


def _translate_all(details: list[ErrorDetails], source: YamlSource) -> list[SpecError]:
    """One error a mistake: the members of a union that a value fits none of are told together, and a key that is
    missing because it is misspelled is told once."""
    errors: dict[str, SpecError] = {}
    for detail in details:
        if detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]:
            continue  # pydantic counts the good items only; the bad ones are told by themselves
        error = _translate(detail, source)
        if error.message in errors:
            errors[error.message].cause += f", or {_sentence(detail).removeprefix('it should be ')}"
        else:
            errors[error.message] = error
    misspelled = {error.remedy.split("`")[1] for error in errors.values() if error.remedy.startswith("did you mean")}
    return [
        error
        for error in errors.values()
        if not (error.remedy.startswith("add `") and error.remedy.split("`")[1].split(":")[0] in misspelled)
    ]


def _translate(detail: ErrorDetails, source: YamlSource) -> SpecError:
    path = _path_in_file(detail["loc"], source.data)
    shown = ".".join(map(str, path)) or "the experiment"
    kind = detail["type"]
    if kind == "extra_forbidden":
        key = str(detail["loc"][-1])
        owner = ".".join(map(str, path[:-1])) or "an experiment"
        return error_at(source, path, f"`{owner}` has no key `{key}`", remedy=nearest(key, _fields_at(detail["loc"])))
    if kind == "missing":
        key = str(detail["loc"][-1])
        return error_at(source, path, f"`{shown}` lacks `{key}`", remedy=f"add `{key}: ...`")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        kinds = [stage.model_fields["kind"].annotation.__args__[0] for stage in _members(Stage)]
        if kind == "union_tag_not_found":
            return error_at(source, path, f"`{shown}` lacks `kind`", remedy=f"one of: {', '.join(kinds)}")
        given = str(detail["ctx"]["tag"])
        if detail["ctx"]["discriminator"] == "_scorer_tag()":
            known = [scorer.kind() for scorer in SCORERS]
            return error_at(
                source,
                path,
                f"`{shown}` can't be {_shorten(detail['input'])}",
                cause="a scorer is a mapping whose first key is its kind",
                remedy=nearest(given.removesuffix(" scorer"), known),
            )
        if detail["ctx"]["discriminator"] != "'kind'":
            cause = f"it is of the form `{given}`, and only these fit here: {detail['ctx']['expected_tags']}"
            remedy = "name a stage that gives a model, or write {pretrained: <folder or hub name>}"
            return error_at(source, path, f"`{shown}` can't be {_shorten(detail['input'])}", cause=cause, remedy=remedy)
        return error_at(source, (*path, "kind"), f"there is no stage kind `{given}`", remedy=nearest(given, kinds))
    value = _shorten(detail["input"])
    return error_at(source, path, f"`{shown}` can't be {value}", cause=_sentence(detail))


def _sentence(detail: ErrorDetails) -> str:
    text = detail["msg"].removeprefix("Value error, ")
    text = text.replace("Input should be", "it should be").replace("Input", "it")
    return text[:1].lower() + text[1:]


def _shorten(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _kind_of(data: Any) -> str:
    return "a list" if isinstance(data, list) else f"one value ({_shorten(data)})"


def _path_in_file(loc: tuple[int | str, ...], data: Any) -> KeyPath:
    """pydantic's location without the union tags in it, which the file does not have."""
    path: list[int | str] = []
    here = data
    for key in loc:
        if isinstance(here, dict):
            found = key in here
        else:
            found = isinstance(here, list) and isinstance(key, int) and key < len(here)
        if found:
            here = here[key]
            path.append(key)
    return tuple(path)


def _fields_at(loc: tuple[int | str, ...]) -> list[str]:
    """Names of the fields of the model that holds the last key of `loc`: walks the annotations along it."""
    annotation: Any = Experiment
    for key in loc[:-1]:
        annotation = _step(annotation, key)
    model = next((member for member in _members(annotation) if _is_model(member)), None)
    return list(model.model_fields) if model else []


def _step(annotation: Any, key: int | str) -> Any:
    if _is_model(annotation):
        field = annotation.model_fields.get(key)
        if field is None:
            return annotation
        # Field() metadata is split off the annotation by pydantic; what matters here are its members.
        return field.annotation
    origin = get_origin(annotation)
    if origin is dict:
        return get_args(annotation)[1]
    if origin is tuple:
        return get_args(annotation)[0]
    for member in _members(annotation):
        if key in _tags(member):
            return _bare(member)
    for member in _members(annotation):
        if _is_model(_bare(member)) or get_origin(_bare(member)) in (dict, tuple):
            return _step(_bare(member), key)
    return annotation


def _members(annotation: Any) -> list[Any]:
    bare = _bare(annotation)
    return list(get_args(bare)) if get_origin(bare) is Union or type(bare).__name__ == "UnionType" else [bare]


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def _tags(member: Any) -> set[str]:
    tags = {item.tag for item in getattr(member, "__metadata__", ()) if isinstance(item, Tag)}
    bare = _bare(member)
    if _is_model(bare) and "kind" in bare.model_fields:
        tags.add(get_args(bare.model_fields["kind"].annotation)[0])
    return tags


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Spec)
