"""The builtin corpus: real texts, identical on every machine, and no response in more than one split."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tunery.ingest import python_docs
from tunery.ingest.python_docs import Row, Subset, documented_objects, identity, rows, unimportable_modules
from tunery.ingest.split import split_of

SUBSETS: tuple[Subset, ...] = ("texts", "questions", "preferences", "prompts")
PLATFORM = Path(python_docs.__file__).parents[2]


@cache
def all_rows(subset: Subset) -> list[Row]:
    return list(rows(subset))


def run_python(code: str, **environment: str) -> str:
    """Return the output of a new interpreter with the package and these environment variables."""
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(PLATFORM), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return finished.stdout.strip()


def normalised(text: str) -> str:
    return " ".join(text.split()).casefold()


def response_of(row: Row) -> str:
    content = row["messages"][-1]["content"]
    assert isinstance(content, str)
    return content


def test_rows_do_not_depend_on_the_hash_seed_or_the_environment(tmp_path: Path) -> None:
    code = (
        "import hashlib, json\n"
        "from tunery.ingest.python_docs import rows\n"
        "digest = hashlib.sha256()\n"
        "for subset in ('texts', 'questions', 'preferences', 'prompts'):\n"
        "    for row in rows(subset): digest.update(json.dumps(row).encode())\n"
        "print(digest.hexdigest())"
    )
    folder = str(tmp_path)
    environment = {"HOME": folder, "TMPDIR": folder, "LANG": "C", "TZ": "Asia/Tokyo", "COLUMNS": "40"}
    digest = hashlib.sha256()
    for subset in SUBSETS:
        for row in all_rows(subset):
            digest.update(json.dumps(row).encode())
    assert run_python(code, PYTHONHASHSEED="1") == digest.hexdigest()
    assert run_python(code, PYTHONHASHSEED="2", **environment) == digest.hexdigest()


def test_corpus_has_thousands_of_objects_and_the_language_reference() -> None:
    objects = [item for item in documented_objects() if item.kind != "topic"]
    topics = [item for item in documented_objects() if item.kind == "topic"]
    assert len(objects) > 3000
    assert sum(len(item.doc) for item in objects) > 600_000
    assert len(topics) > 60
    assert sum(len(topic.doc) for topic in topics) > 300_000
    kinds = Counter(item.kind for item in objects)
    assert set(kinds) == {"module", "class", "function", "method", "property"}
    assert min(kinds.values()) > 100


@pytest.mark.parametrize(
    ("name", "kind", "signature"),
    [
        ("os.path.join", "function", "(a, *p)"),
        ("print", "function", None),
        ("asyncio.run", "function", None),
        ("collections.Counter.most_common", "method", "(self, n=None)"),
        ("json", "module", ""),
        ("threading.Thread.daemon", "property", ""),
        ("unittest.TestCase", "class", None),
        ("topic:if", "topic", ""),
    ],
)
def test_objects_have_their_usual_names(name: str, kind: str, signature: str | None) -> None:
    item = next(item for item in documented_objects() if item.name == name)
    assert item.kind == kind
    assert signature is None or item.signature == signature


def test_names_are_public_and_unique() -> None:
    names = [item.name for item in documented_objects()]
    assert names == sorted(set(names))
    parts = [part for name in names if not name.startswith("topic:") for part in name.split(".")]
    assert not [part for part in parts if part.startswith("_") and not part.endswith("__")]


def test_no_two_objects_share_a_docstring() -> None:
    docs = Counter(normalised(item.doc) for item in documented_objects())
    assert docs.most_common(1)[0][1] == 1


def test_corpus_has_no_addresses_or_paths_of_this_machine() -> None:
    corpus = "\n".join(item.doc + item.signature for item in documented_objects())
    assert not re.search(r"\bat 0x[0-9a-fA-F]+", corpus)
    assert sys.base_prefix.rstrip("/") in ("", "/usr") or sys.base_prefix not in corpus
    assert str(Path.home()) in ("/", "/root") or str(Path.home()) not in corpus


def test_reading_the_corpus_imports_few_modules() -> None:
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from tunery.ingest.python_docs import rows\n"
        "list(rows('texts'))\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    imported = run_python(code).split()
    assert "tunery.ingest.python_docs" in imported
    assert len(imported) < 120
    assert not {"asyncio", "curses", "pydoc_data.topics", "sqlite3", "xml", "unittest"} & set(imported)


def test_modules_that_cannot_be_imported_are_listed_with_the_reason() -> None:
    missing = unimportable_modules()
    unavailable = "winreg" if sys.platform != "win32" else "fcntl"
    assert "ModuleNotFoundError" in missing[unavailable]
    assert len(missing) < 40
    assert not missing.keys() & {item.name for item in documented_objects()}


def test_failed_child_is_an_error_with_the_end_of_its_stderr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit('no documentation today')")
    monkeypatch.setattr(python_docs, "__file__", str(broken))
    with pytest.raises(RuntimeError, match=r"status 1.*no documentation today"):
        python_docs._read.__wrapped__()


def test_identity_has_interpreter_and_platform_without_reading_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_docs, "_read", lambda: pytest.fail("identity read the corpus"))
    version = ".".join(str(part) for part in sys.version_info[:3])
    assert sys.implementation.name in identity()
    assert version in identity()
    assert sys.platform in identity()
    before = identity()
    monkeypatch.setattr(python_docs, "CORPUS_VERSION", python_docs.CORPUS_VERSION + 1)
    assert identity() != before


@pytest.mark.parametrize("subset", SUBSETS)
def test_first_rows_are_a_representative_sample(subset: Subset) -> None:
    def shares(sample: list[Row]) -> dict[str, float]:
        kind_of = {item.name: item.kind for item in documented_objects()}
        kinds = Counter(kind_of[row["group"]] for row in sample)
        return {kind: kinds[kind] / len(sample) for kind in kind_of.values()}

    all_shares, first = shares(all_rows(subset)), shares(all_rows(subset)[:1000])
    assert all(abs(all_shares[kind] - first[kind]) < 0.06 for kind in all_shares)
    splits = Counter(split_of(row["group"], 0.2) for row in all_rows(subset)[:1000])
    assert 120 < splits["test"] < 280
    assert 120 < splits["validation"] < 280


def test_texts_are_passages_with_headings_of_bounded_length() -> None:
    texts = all_rows("texts")
    assert {frozenset(row) for row in texts} == {frozenset({"text", "group"})}
    bodies = [row["text"].split("\n\n", 1)[1] for row in texts]
    # Texts are split at lines only: a longer line would not be split.
    assert max(map(len, bodies)) <= python_docs.MAX_PASSAGE_CHARS
    assert all(body.strip() for body in bodies)
    join = next(row["text"] for row in texts if row["group"] == "os.path.join")
    assert join.startswith("os.path.join(a, *p)\n\nJoin two or more pathname components")
    passages = Counter(row["group"] for row in texts)
    assert passages["topic:types"] > 5


def test_no_paragraph_of_the_reference_occurs_in_two_groups() -> None:
    groups: dict[str, set[str]] = {}
    for row in all_rows("texts"):
        if row["group"].startswith("topic:"):
            for paragraph in row["text"].split("\n\n")[1:]:
                if len(paragraph) >= python_docs.MIN_QUOTATION_CHARS:
                    groups.setdefault(normalised(paragraph), set()).add(row["group"])
    assert len(groups) > 1000
    assert not [paragraph for paragraph, occurrences in groups.items() if len(occurrences) > 1]


def test_texts_keep_nearly_all_of_every_docstring() -> None:
    texts: dict[str, str] = {}
    for row in all_rows("texts"):
        texts[row["group"]] = texts.get(row["group"], "") + row["text"].split("\n\n", 1)[1]
    for item in documented_objects():
        if item.kind != "topic":
            assert "".join(texts[item.name].split()) == "".join(item.doc.split()), item.name


def test_questions_name_their_object_and_responses_start_its_docstring() -> None:
    doc_of = {item.name: item.doc for item in documented_objects()}
    for row in all_rows("questions"):
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert f"`{row['group']}`" in user["content"]
        response = assistant["content"]
        assert normalised(doc_of[row["group"]]).startswith(normalised(response))
        assert python_docs.MIN_RESPONSE_CHARS <= len(response) <= python_docs.MAX_RESPONSE_CHARS
    assert len(all_rows("questions")) > 3000


def test_every_question_template_is_used() -> None:
    used = Counter(re.sub(r"`.*`", "`{}`", row["messages"][0]["content"]) for row in all_rows("questions"))
    assert set(used) == {template for templates in python_docs.QUESTION_TEMPLATES.values() for template in templates}


@pytest.mark.parametrize("subset", ["questions", "preferences"])
def test_no_response_occurs_twice(subset: Subset) -> None:
    responses = Counter(normalised(response_of(row)) for row in all_rows(subset))
    assert responses.most_common(1)[0][1] == 1
    groups = Counter(row["group"] for row in all_rows(subset))
    assert groups.most_common(1)[0][1] == 1


def test_rejected_responses_belong_to_another_object_of_the_same_kind() -> None:
    kind_of = {item.name: item.kind for item in documented_objects()}
    owner = {response_of(row): row["group"] for row in all_rows("questions")}
    for row in all_rows("preferences"):
        (rejected,) = row["rejected"]
        assert rejected["role"] == "assistant"
        assert owner[rejected["content"]] != row["group"]
        assert kind_of[owner[rejected["content"]]] == kind_of[row["group"]]
    uses = Counter(row["rejected"][0]["content"] for row in all_rows("preferences"))
    assert uses.most_common(1)[0][1] == 1


def test_prompts_and_preferences_are_those_of_the_questions() -> None:
    questions = all_rows("questions")
    assert all_rows("prompts") == [{**row, "messages": row["messages"][:1]} for row in questions]
    assert [(row["messages"], row["group"]) for row in all_rows("preferences")] == [
        (row["messages"], row["group"]) for row in questions
    ]


def test_unknown_subset_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no subset 'answers': choose one of texts, questions"):
        rows("answers")  # type: ignore[arg-type]


def test_long_paragraph_is_cut_at_a_sentence_and_a_heading_of_omitted_text_is_removed() -> None:
    sentence = "It says a little more than that. "
    assert python_docs._response(sentence * 40) == (sentence * 18).strip()
    assert python_docs._response("Do it.\n\nUsage:\n\n" + "x" * 600) == "Do it."
    assert python_docs._response("x" * 601) == ""


def test_address_in_a_docstring_is_masked() -> None:
    (item,) = python_docs._documented_object("f", "property", None, "Like <object object at 0x7f52a81c>.")
    assert item.doc == "Like <object object at 0x...>."
