"""Checksums of an artifact: path, bytes and SHA-256 of its files, written when it is committed.

    <artifact>/checksums.json    {"bytes": total, "files": [{"path", "bytes", "sha256"}, ..]}, sorted by path

They are a file of their own, not a key of manifest.json, for two reasons. A run reads the manifest of every artifact
that it reuses, and an artifact may have 10,000 shards: their checksums are 1.3 MB, which only `tunery store verify`
needs. And the cache key of tokenised rows covers the bytes of manifest.json, which therefore must not change. The total
is the first field, so that `tunery store ls` reads only the beginning of the file.

The list has all files except itself and runtime_stats.json. The latter differs between two builds of a stage, and
without it equal builds have equal checksums: a difference of two checksums.json names the files that differ. Of
runtime_stats.json `verify` checks that it is complete JSON, like every reader.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tunery.store.atomic_write import read_json, write_text

CHECKSUMS = "checksums.json"
MANIFEST = "manifest.json"
RUNTIME_STATS = "runtime_stats.json"
UNLISTED = frozenset({CHECKSUMS, RUNTIME_STATS})
"""Files of an artifact that have no checksum."""
CHUNK_BYTES = 1 << 20
MAX_THREADS = 8
"""SHA-256 takes 0.3 to 2 GB/s per core and releases the GIL; more threads than this would wait for the storage."""
HEAD_BYTES = 64
"""Length of the beginning of checksums.json that contains the total."""
_TOTAL = re.compile(rb'\A\{"bytes": (\d+),')


@dataclass(frozen=True)
class FileChecksum:
    path: str
    """Relative to the artifact, with `/`."""
    bytes: int
    sha256: str


def files_of(artifact: Path) -> list[str]:
    """Return the files in an artifact that have a checksum, sorted. Links to files count as files."""
    found: list[str] = []
    folders = [""]
    while folders:
        prefix = folders.pop()
        with os.scandir(artifact / prefix) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{prefix}{entry.name}/")
                elif entry.is_file() and (prefix or entry.name not in UNLISTED):
                    found.append(prefix + entry.name)
    return sorted(found)


def write_checksums(artifact: Path, visit: Callable[[Path], object] = lambda path: None) -> None:
    """Compute and write the checksums of an artifact. `visit` is called with the path of each file in the threads that
    read them, after it was read."""

    def checksum(name: str) -> FileChecksum:
        path = artifact / name
        size, digest = sha256_of(path)
        visit(path)
        return FileChecksum(name, size, digest)

    with hashing_threads() as pool:
        files = list(pool.map(checksum, files_of(artifact)))
    lines = ",\n".join(json.dumps(asdict(file)) for file in files)
    write_text(artifact / CHECKSUMS, f'{{"bytes": {sum(file.bytes for file in files)}, "files": [\n{lines}\n]}}\n')


def read_checksums(artifact: Path) -> list[FileChecksum] | None:
    """Return the checksums of an artifact; None if their file is absent, truncated or otherwise unreadable."""
    value = read_json(artifact / CHECKSUMS)
    try:
        return None if value is None else [FileChecksum(**entry) for entry in value["files"]]
    except (KeyError, TypeError):
        return None


def size_and_time(artifact: str) -> tuple[int, float]:
    """Return the bytes of an artifact, and when it was committed in seconds since the epoch: from checksums.json, of
    which only the beginning is read. If there is none, the size of its files and the time of the folder."""
    try:
        descriptor = os.open(f"{artifact}/{CHECKSUMS}", os.O_RDONLY)
    except FileNotFoundError:
        pass
    else:
        try:
            if (match := _TOTAL.match(os.read(descriptor, HEAD_BYTES))) is not None:
                return int(match[1]), os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
    folder = Path(artifact)
    return sum((folder / name).stat().st_size for name in files_of(folder)), folder.stat().st_mtime


def sha256_of(path: Path, progress: Callable[[int], object] = lambda count: None) -> tuple[int, str]:
    """Return the bytes and the SHA-256 of a file. Only a chunk is in memory; `progress` gets the size of each."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            progress(len(chunk))
    return size, digest.hexdigest()


def hashing_threads() -> ThreadPoolExecutor:
    """Return a pool of threads for `sha256_of`, one per CPU."""
    return ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0))), thread_name_prefix="sha256")
