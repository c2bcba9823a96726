"""Parse YAML 1.2 into plain data and the line numbers of all keys and list items.

PyYAML implements YAML 1.1, where `no` is false and `1e-5` is a string. Here PyYAML only builds the nodes; plain scalars
are resolved by the YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema), where `no` is a string and
`1e-5` a number. ruamel.yaml (0.19) takes 2.5 times as long and reads `1_000` as a number and `2001-01-01` as a date.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from tunery.errors import SpecError

Path = tuple[str | int, ...]

MAX_CHARS = 1_000_000
MAX_NODES = 100_000
"""Number of values of a document after aliases are replaced."""
_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"([-+]?)\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")


@dataclass(frozen=True)
class YamlSource:
    """A parsed YAML file. `lines[path]` is the 1-based line of the key or list item at `path`."""

    file: str
    text: str
    data: Any
    lines: dict[Path, int]

    def line(self, path: Path) -> int:
        """Return the line of `path`; if the file does not have it, the line of its nearest ancestor."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_yaml(text: str, file: str) -> YamlSource:
    """Parse one document. Raises SpecError, with the line, for invalid YAML, duplicate keys, and a document that is too
    large, also by its aliases."""
    if len(text) > MAX_CHARS:
        raise SpecError(
            f"the file has {len(text):,} characters",
            file=file,
            line=1,
            cause=f"at most {MAX_CHARS:,} are read: an experiment has a few thousand",
            remedy="give the experiment file; rows belong in a data file that a dataset stage reads",
        )
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        begin = error.context_mark
        mark = error.problem_mark or begin
        raise SpecError(
            f"not valid YAML: {error.problem or error.context}",
            file=file,
            line=mark.line + 1 if mark else 0,
            cause=f"{error.context} that starts in line {begin.line + 1}" if error.context and begin else "",
            remedy="check the indentation, and quote text that contains ': ' or ' #'",
        ) from None
    except yaml.reader.ReaderError as error:
        raise SpecError(
            f"not valid YAML: the character {error.character:#04x} is not allowed",
            file=file,
            line=text.count("\n", 0, error.position) + 1,
            remedy="remove it, or write it in double quotes as an escape",
        ) from None
    except RecursionError:
        remedy = "reduce the nesting; an experiment has few levels"
        raise SpecError("the file is nested too deep", file=file, line=1, remedy=remedy) from None
    lines: dict[Path, int] = {}
    if node is not None and (size := _size(node, {})) > MAX_NODES:
        raise SpecError(
            f"the file has {size:,} values" if size < 1e12 else "the file has more than 10^12 values",
            file=file,
            line=1,
            cause=f"aliases (`*name`) repeat what they refer to; at most {MAX_NODES:,} values are read",
            remedy="remove aliases to lists of aliases",
        )
    data = None if node is None else _build(node, (), lines, file, ())
    return YamlSource(file=file, text=text, data=data, lines=lines)


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the number of values below a node, with those that its aliases repeat. `sizes`: results by node id; a node
    that contains itself counts once, and `_build` rejects it."""
    if id(node) not in sizes:
        sizes[id(node)] = 1
        if isinstance(node, yaml.SequenceNode):
            sizes[id(node)] = 1 + sum(_size(item, sizes) for item in node.value)
        elif isinstance(node, yaml.MappingNode):
            sizes[id(node)] = 1 + sum(_size(key, sizes) + _size(value, sizes) for key, value in node.value)
    return sizes[id(node)]


def _build(node: yaml.Node, path: Path, lines: dict[Path, int], file: str, within: tuple[yaml.Node, ...]) -> Any:
    """Convert a node to plain data and record the lines below `path`. `within` are the ancestors of the node: an alias
    to one of them would be an infinite recursion."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style in ("'", '"', "|", ">") else plain_scalar(node.value)
    if any(node is outer for outer in within):
        raise SpecError(
            f"`{'.'.join(map(str, path))}` contains itself", file=file, line=lines[path[:-1]], remedy="remove the alias"
        )
    within = (*within, node)
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, index), lines, file, within) for index, item in enumerate(node.value)]
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise SpecError("a key must be a word, not a list or a mapping", file=file, line=line)
        if key == "<<" and key_node.style is None:
            raise SpecError("YAML 1.2 has no merge key `<<`", file=file, line=line, remedy="write the keys out")
        if key in result:
            raise SpecError(
                f"`{'.'.join(map(str, (*path, key)))}` is given twice",
                file=file,
                line=line,
                cause=f"it is already in line {lines[(*path, key)]}",
                remedy="rename one of the two, or remove it",
            )
        lines[(*path, key)] = line
        result[key] = _build(value_node, (*path, key), lines, file, within)
    return result


def plain_scalar(text: str) -> Any:
    """Return the value of an unquoted YAML 1.2 scalar: None, bool, int, float or str."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INT.fullmatch(text):
        # Longer integers are text, which no field for a number accepts. Python's int() rejects more than 4,300 digits.
        return int(text) if len(text) <= 20 and -(2**63) <= int(text) < 2**63 else text
    if _OCTAL.fullmatch(text):
        return int(text[2:], 8)
    if _HEX.fullmatch(text):
        return int(text[2:], 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if match := _INF.fullmatch(text):
        return float(f"{match.group(1)}inf")
    if _NAN.fullmatch(text):
        return float("nan")
    return text
