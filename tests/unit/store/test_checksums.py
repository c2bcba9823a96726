"""Checksums of artifacts, and the permissions of the store."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from tunery.store import Artifact, Store, new_output_dir
from tunery.store.checksums import CHECKSUMS, files_of, read_checksums, size_and_time, write_checksums

FILES = {"b.txt": b"b", "a/z.bin": b"z" * 3_000_000, "a/b/empty": b"", "a.txt": b"a", "a-b.txt": b"ab"}


def commit(store: Store, seconds: float = 1.5, files: dict[str, bytes] = FILES) -> Artifact:
    manifest: dict[str, Any] = {"kind": "sft", "fingerprint": "0123456789abcdef", "facts": {"rows": 3}}
    with store.lease("sft", manifest["fingerprint"]) as lease:
        out = new_output_dir(store.staging_dir("sft", manifest["fingerprint"]), lease)
        for name, content in files.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
        return store.commit(out, manifest, {"seconds": seconds}, lease)


def test_commit_records_bytes_and_sha256_of_every_file_in_order_of_paths(tmp_path: Path) -> None:
    artifact = commit(Store(tmp_path))
    manifest = (artifact.path / "manifest.json").read_bytes()
    expected = {**FILES, "manifest.json": manifest}
    listed = read_checksums(artifact.path)
    assert listed is not None
    assert [(file.path, file.bytes, file.sha256) for file in listed] == [
        (name, len(expected[name]), hashlib.sha256(expected[name]).hexdigest()) for name in sorted(expected)
    ]
    assert json.loads((artifact.path / CHECKSUMS).read_text())["bytes"] == sum(map(len, expected.values()))


def test_manifest_has_only_what_it_had_before_checksums(tmp_path: Path) -> None:
    artifact = commit(Store(tmp_path))
    assert (artifact.path / "manifest.json").read_text() == (
        '{\n "facts": {\n  "rows": 3\n },\n "fingerprint": "0123456789abcdef",\n "kind": "sft"\n}\n'
    )
    assert artifact.facts == {"rows": 3, "seconds": 1.5}


def test_equal_outputs_have_equal_checksums_whatever_their_times(tmp_path: Path) -> None:
    first, second = commit(Store(tmp_path / "a"), 1.0), commit(Store(tmp_path / "b"), 2.0)
    assert (first.path / CHECKSUMS).read_bytes() == (second.path / CHECKSUMS).read_bytes()


def test_size_is_read_from_the_checksums_or_from_the_files_of_an_artifact_without(tmp_path: Path) -> None:
    artifact = commit(Store(tmp_path))
    size, created = size_and_time(str(artifact.path))
    assert size == sum((artifact.path / name).stat().st_size for name in files_of(artifact.path))
    assert created == (artifact.path / CHECKSUMS).stat().st_mtime
    (artifact.path / CHECKSUMS).unlink()
    assert size_and_time(str(artifact.path)) == (size, artifact.path.stat().st_mtime)


def test_size_of_an_artifact_with_truncated_checksums_is_that_of_its_files(tmp_path: Path) -> None:
    artifact = commit(Store(tmp_path))
    size, _ = size_and_time(str(artifact.path))
    path = artifact.path / CHECKSUMS
    content = path.read_bytes()
    for length in range(len(f'{{"bytes": {size}')):
        path.write_bytes(content[:length])
        assert size_and_time(str(artifact.path))[0] == size
    for length in range(len(content.rstrip())):
        path.write_bytes(content[:length])
        assert read_checksums(artifact.path) is None


@pytest.mark.parametrize("count", [0, 1, 2000])
def test_artifacts_of_any_number_of_files_have_checksums(count: int, tmp_path: Path) -> None:
    for number in range(count):
        (tmp_path / f"part-{number:05d}").write_text(str(number))
    write_checksums(tmp_path)
    listed = read_checksums(tmp_path)
    assert listed is not None
    assert [file.path for file in listed] == [f"part-{number:05d}" for number in range(count)]


def test_links_to_files_are_read_and_other_links_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "target").write_text("content")
    for name, target in (("file", "target"), ("folder", "artifact"), ("broken", "absent")):
        (tmp_path / "artifact" / name).symlink_to(tmp_path / target)
    assert files_of(tmp_path / "artifact") == ["file"]


# Permissions.


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_store_is_for_its_owner_only_and_its_parents_are_not(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        commit(Store(tmp_path / "parent" / "store"))
        assert mode(tmp_path / "parent" / "store") == 0o700
        assert mode(tmp_path / "parent") == 0o755
    finally:
        os.umask(before)


def test_permissions_of_an_existing_store_are_not_changed(tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir()
    root.chmod(0o2770)
    commit(Store(root))
    assert mode(root) == 0o2770
