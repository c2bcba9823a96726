"""Reduce the schemas of KubeRay and SkyPilot to what the files of cluster/ are validated against.

    python tests/support/reduced_schemas.py kuberay VERSION FOLDER    # has the files of the chart's folder `crds`
    python tests/support/reduced_schemas.py skypilot VERSION .        # in an environment with the package skypilot

writes tests/unit/cluster/schemas/NAME.json: the same constraints without texts, defaults and extensions that JSON
Schema does not know, and with each repeated part stored once. `strict` is for reading them: it rejects unknown fields,
which the API server of Kubernetes would drop silently.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Schema = dict[str, Any]
FOLDER = Path(__file__).parents[1] / "unit" / "cluster" / "schemas"
PRESERVE = "x-kubernetes-preserve-unknown-fields"
KEYWORDS = (
    "type", "enum", "const", "required", "pattern", "minimum", "maximum", "exclusiveMinimum", "minLength", "maxLength",
    "minItems", "maxItems", "minProperties", "maxProperties", PRESERVE,
)  # fmt: skip
"""Keywords that are copied, besides those with schemas in them."""
MIN_SHARED = 200
"""A repeated schema of fewer characters is not stored separately."""


def children(schema: Schema, apply: Callable[[Any], Any]) -> Schema:
    """Return the keywords of `schema` that contain schemas, with `apply` called on each of these schemas."""
    result: Schema = {}
    for keyword in ("properties", "patternProperties", "$defs"):
        if keyword in schema:
            result[keyword] = {name: apply(value) for name, value in schema[keyword].items()}
    for keyword in ("items", "additionalProperties", "not"):
        if isinstance(schema.get(keyword), dict):
            result[keyword] = apply(schema[keyword])
    if isinstance(schema.get("additionalProperties"), bool):
        result["additionalProperties"] = schema["additionalProperties"]
    for keyword in ("anyOf", "allOf", "oneOf"):
        if keyword in schema:
            result[keyword] = [apply(value) for value in schema[keyword]]
    return result


def reduce(schema: Schema) -> Schema:
    """Return the constraints of `schema` only."""
    result = {key: schema[key] for key in KEYWORDS if key in schema} | children(schema, reduce)
    if "case_sensitive_enum" in schema:  # of SkyPilot
        result["enum"] = schema["case_sensitive_enum"]
    if "case_insensitive_enum" in schema:
        result["enum"] = sorted(
            {form for word in schema["case_insensitive_enum"] for form in (word.lower(), word.upper())}
        )
    return result


def share(schemas: dict[str, Schema]) -> Schema:
    """Return a schema whose `$defs` has `schemas` and each larger part that occurs several times in them."""
    counts = Counter(json.dumps(part, sort_keys=True) for schema in schemas.values() for part in parts(schema))
    names: dict[str, str] = {}
    shared: dict[str, Schema] = {}

    def replace(schema: Schema) -> Schema:
        text = json.dumps(schema, sort_keys=True)
        if counts[text] < 2 or len(text) < MIN_SHARED:
            return schema | children(schema, replace)
        if text not in names:
            names[text] = f"part{len(names)}"
            shared[names[text]] = schema | children(schema, replace)
        return {"$ref": f"#/$defs/{names[text]}"}

    replaced = {name: schema | children(schema, replace) for name, schema in schemas.items()}
    return {"$defs": replaced | shared}


def parts(schema: Schema) -> Iterator[Schema]:
    """Yield the schema and all schemas in it."""
    found: list[Schema] = []
    children(schema, lambda part: found.extend(parts(part)))
    yield schema
    yield from found


def strict(schema: Schema) -> Schema:
    """Return `schema` so that objects with `properties` reject all others, unless they preserve unknown fields."""
    result = schema | children(schema, strict)
    if "properties" in schema and not schema.get(PRESERVE) and not isinstance(schema.get("additionalProperties"), dict):
        # `patternProperties` stay allowed beside it.
        result["additionalProperties"] = False
    return result


def errors(name: str, kind: str, document: Any) -> list[str]:
    """Return what is wrong with a document of the kind `kind`, whose schema is in the file `name`."""
    from jsonschema import Draft202012Validator

    schemas = strict(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))
    validator = Draft202012Validator(schemas | {"$ref": f"#/$defs/{kind}"})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


def kuberay(folder: Path) -> dict[str, Schema]:
    """Return the reduced schemas of RayCluster and RayJob. `folder`: has the CRDs."""
    import yaml

    schemas = {}
    for kind in ("RayCluster", "RayJob"):
        text = (folder / f"ray.io_{kind.lower()}s.yaml").read_text(encoding="utf-8")
        versions = yaml.load(text, Loader=yaml.CSafeLoader)["spec"]["versions"]
        (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
        del schema["properties"]["status"]  # written by the operator
        schemas[kind] = reduce(schema)
    return schemas


def skypilot(_: Path) -> dict[str, Schema]:
    """Return the reduced schemas of a task, with those of its resources and mounts in it, and of a volume. Needs the
    package skypilot."""
    from sky.utils import schemas  # type: ignore[import-not-found]

    task = schemas.get_task_schema()
    fields = task["properties"]
    fields["resources"] = schemas.get_resources_schema()
    fields["file_mounts"]["additionalProperties"] = {"anyOf": [{"type": "string"}, schemas.get_storage_schema()]}
    for unused in ("config", "service", "pool", "inputs", "outputs"):
        del fields[unused]
    return {"Task": reduce(task), "Volume": reduce(schemas.get_volume_schema())}


SOURCES = {
    "kuberay": (kuberay, "https://github.com/ray-project/kuberay", "helm-chart/kuberay-operator/crds"),
    "skypilot": (skypilot, "https://pypi.org/project/skypilot", "sky/utils/schemas.py"),
}


def main() -> None:
    name, version, folder = sys.argv[1:]
    derive, project, path = SOURCES[name]
    origin = {"project": project, "version": version, "path": path, "license": "Apache-2.0"}
    document = {"$comment": origin, **share(derive(Path(folder)))}
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, separators=(",", ":"), sort_keys=True)
    (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
