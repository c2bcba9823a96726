"""docs/templates.md matches the encoding."""

from __future__ import annotations

from template_table import PATH, page


def test_table_of_templates_is_up_to_date() -> None:
    command = "PYTHONPATH=platform:tests/support python tests/support/template_table.py"
    assert PATH.read_text(encoding="utf-8") == page(), f"out of date: run {command}"
