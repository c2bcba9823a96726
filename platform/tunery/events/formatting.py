"""Format numbers, times and overrides for the terminal and the report.

Functions must not fail on unexpected values: facts may come from stage kinds that this version does not know.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence


def as_number(value: object) -> float | None:
    """Return `value` as a finite float; None for NaN, infinity and other types."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def strings(value: object) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else []


def count(value: float) -> str:
    """4000 -> '4,000'."""
    return f"{value:,.0f}"


def measure(value: float, digits: int = 4) -> str:
    """Format a loss, perplexity or learning rate with about `digits` significant digits and thousands separators."""
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 10**digits:
        return f"{value:,.0f}"
    if size < 0.01:
        mantissa, exponent = f"{value:.{digits - 2}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    # Leading zeros after the point are not significant: 0.0123, but 0.456 like 1.234.
    decimals = digits - 1 - max(0, math.floor(math.log10(size))) + (size < 0.1)
    return f"{value:,.{decimals}f}"


def share(part: float, whole: float) -> str:
    """Format a share in percent; a value that only rounds to 0% or 100% gets a decimal."""
    if whole <= 0:
        return "0%"
    percent = 100 * part / whole
    rounded = f"{percent:.0f}"
    return f"{percent:.1f}%" if (rounded in ("0", "100") and part not in (0, whole)) or percent < 1 else f"{rounded}%"


def duration(seconds: float) -> str:
    """65 -> '1m 05s'."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m {total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h {total % 3600 // 60:02d}m"
    return f"{total // 86400}d {total % 86400 // 3600:02d}h"


def speed(rate: float, unit: str) -> str:
    """(1240, 'rows') -> '1,240 rows/s'; below 0.1 per second the unit is per minute."""
    if 0 < rate < 0.1:
        return f"{rate * 60:.2g} {unit}/min"
    return f"{count(rate) if rate >= 10 else f'{rate:.1f}' if rate >= 1 else f'{rate:.2f}'} {unit}/s"


def size(number_of_bytes: float) -> str:
    value = number_of_bytes
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:,.0f} {unit}" if unit in ("B", "KiB") else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def plain(value: object, key: str = "") -> str:
    """Format any value of a fact, an override or a cell; a `key` that ends in bytes or seconds sets the unit."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        number = as_number(value)
        if number is None:
            return str(value)
        if key.endswith("bytes"):
            return size(number)
        if key.endswith("seconds"):
            return duration(number)
        text = f"{value:,}" if isinstance(value, int) else measure(number)
        return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {plain(item, str(name))}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return str(value)


def cells(values: Sequence[object]) -> list[str]:
    """Format the cells of a column; floats get the same number of decimals, as few as possible."""
    numbers = [number for value in values if isinstance(value, float) and (number := as_number(value)) is not None]
    largest = max((abs(number) for number in numbers), default=0.0)
    smallest = min((abs(number) for number in numbers if number), default=0.0)
    if not numbers or smallest < 0.01:
        return [plain(value) for value in values]
    max_decimals = 3 if largest < 10 else 2 if largest < 100 else 1 if largest < 1000 else 0
    decimals = next(
        (d for d in range(max_decimals) if all(abs(round(number, d) - number) < 1e-9 for number in numbers)),
        max_decimals,
    )
    return [
        f"{value:,.{decimals}f}" if isinstance(value, float) and math.isfinite(value) else plain(value)
        for value in values
    ]


def is_numeric(values: Iterable[object]) -> bool:
    """Whether a column has only numbers and empty cells, and is right-aligned."""
    present = [value for value in values if value is not None]
    return bool(present) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in present)


def short_paths(paths: Iterable[str]) -> dict[str, str]:
    """Map each path to its shortest unique suffix: 'sft.learning_rate' -> 'learning_rate'."""
    parts = {path: path.split(".") for path in dict.fromkeys(paths)}
    short: dict[str, str] = {}
    for path, names in parts.items():
        others = [other for other in parts if other != path]
        endings = (".".join(names[-length:]) for length in range(1, len(names) + 1))
        short[path] = next(
            (end for end in endings if not any(f".{other}".endswith(f".{end}") for other in others)), path
        )
    return short


def overrides_text(overrides: Mapping[str, object], names: Mapping[str, str] | None = None) -> str:
    """{'sft.epochs': 2} -> 'sft.epochs=2', or with the shorter `names` 'epochs=2'."""
    return "  ".join(
        f"{(names or {}).get(path, path)}={plain(value)}" for path, value in scheduled_values(overrides).items()
    )


def scheduled_values(overrides: Mapping[str, object]) -> dict[str, object]:
    """Merge `schedule_overrides` into the fields that they change: learning_rate '1e-3 → 1.2e-3'."""
    values = {path: value for path, value in overrides.items() if not path.endswith(".schedule_overrides")}
    for path, changes in overrides.items():
        if path in values or not isinstance(changes, list | tuple):
            continue
        for change in changes:
            for field, value in change.items():
                name = f"{path.removesuffix('.schedule_overrides')}.{field}"
                if field != "after" and value is not None:
                    values[name] = f"{plain(values[name])} → {plain(value)}" if name in values else plain(value)
    return values


def with_ci(mean: float, half_width: float | None) -> str:
    """Format mean ± half of the confidence interval, with two significant digits of the latter."""
    if not half_width:
        return measure(mean)
    digits = min(8, max(0, 1 - math.floor(math.log10(half_width))))
    return f"{mean:,.{digits}f} ± {half_width:,.{digits}f}"
