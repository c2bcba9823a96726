"""Finds files on the local disk, S3 or Google Cloud Storage by path, pattern or folder, and opens them.

    corpus.jsonl   data/*.csv   data/**/*.jsonl.gz   data/            relative to the experiment file
    s3://bucket/path/*.parquet  gs://bucket/folder/                   with the credentials of the environment

.gz and .zst files are decompressed while reading. Network operations time out after a few seconds.
"""

from __future__ import annotations

import fnmatch
import glob
import io
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Protocol, cast

from tunery.store.fingerprint import file_digest

REMOTE = ("s3://", "gs://")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
CONNECT_TIMEOUT_S = 5
"""Connection timeout in seconds, after which a remote file is unavailable."""
CHUNK_BYTES = 1 << 16


class CorruptFile(Exception):
    """The file can't be read any further; the message is the reason in the quarantine."""


class UnavailableFile(Exception):
    """The file can't be accessed: no network, no permission, a disk error. Its content may be valid."""


class Bytes(Protocol):
    """The input of readers. `read` returns b"" at the end, and raises CorruptFile or UnavailableFile."""

    def read(self, size: int, /) -> bytes: ...


@dataclass
class ByteRange:
    """The lines of a file that start within these bytes, so that several workers can read one file."""

    begin: int
    end: int
    lines: int = field(default=0, compare=False)
    """Number of lines, counted while reading."""


@dataclass(frozen=True)
class File:
    name: str
    """The `source` of its rows: relative to the experiment's folder, absolute, or with s3:// or gs://."""
    path: str
    """Path in its file system."""
    size: int
    version: str = ""
    """Modification time of a remote file, which identifies its content without reading it."""
    from_listing: bool = field(default=False, compare=False)
    """Whether the file comes from listing a folder; such a file may be of an unknown format."""
    span: ByteRange | None = field(default=None, compare=False)
    """The lines to read; None: all lines."""

    @property
    def is_remote(self) -> bool:
        return self.name.startswith(REMOTE)

    @property
    def endings(self) -> tuple[str, str]:
        """(format ending, compression ending) in lower case, such as (".jsonl", ".gz"); "" if missing."""
        stem, ending = os.path.splitext(self.name.lower())
        return (os.path.splitext(stem)[1], ending) if ending in COMPRESSED else (ending, "")

    def identity(self) -> Any:
        """Identity of the content: a digest of a local file, or size and modification time of a remote one."""
        if self.is_remote:
            return [self.name, self.size, self.version]
        try:
            return file_digest(Path(self.path))
        except OSError as error:
            raise UnavailableFile(f"`{self.name}`: {_reason(error)}") from error


def find(source: str, folder: Path) -> list[File]:
    """Return the files that match a path, a pattern or a folder, sorted by name. Raises UnavailableFile.

    Hidden files below a folder (with a path component that starts with `.` or `_`) are skipped.
    """
    return _find_remote(source) if source.startswith(REMOTE) else _find_local(source, folder)


def _find_local(source: str, folder: Path) -> list[File]:
    pattern = os.path.expanduser(source)
    # A file name may contain pattern characters.
    literal = os.path.lexists(folder / pattern)
    names = [pattern] if literal else sorted(glob.glob(pattern, root_dir=folder, recursive=True))
    paths = [folder / name for name in names]
    if literal and paths[0].is_dir():
        listed = (path for path in paths[0].rglob("*") if path.is_file() and _is_visible(path.relative_to(paths[0])))
        return [local_file(path, folder, True) for path in sorted(listed)]
    return [local_file(path, folder) for path in paths if not path.is_dir()]


def local_file(path: Path, folder: Path, from_listing: bool = False) -> File:
    name = str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
    try:
        return File(name, str(path), path.stat().st_size, from_listing=from_listing)
    except OSError as error:
        raise UnavailableFile(f"`{name}`: {_reason(error)}") from error


def _is_visible(path: Path) -> bool:
    return not any(part.startswith((".", "_")) for part in path.parts)


def _find_remote(source: str) -> list[File]:
    from pyarrow.fs import FileSelector, FileType

    scheme, path = source[:5], source[5:].rstrip("/")
    system = _remote_filesystem(scheme)
    base = re.split(r"[^/]*[*?\[]", path, maxsplit=1)[0].rstrip("/")
    try:
        if base == path:
            info = system.get_file_info(path)
            if info.type != FileType.Directory:
                return [] if info.type == FileType.NotFound else [_remote_file(scheme, info)]
        infos = system.get_file_info(FileSelector(base, allow_not_found=True, recursive=True))
    except OSError as error:
        raise UnavailableFile(f"`{source}`: {_reason(error)}") from error
    matches = re.compile(_as_regex(path)).fullmatch if base != path else None
    selected = [
        info
        for info in infos
        if info.type == FileType.File
        and (matches(info.path) if matches else _is_visible(Path(info.path).relative_to(base)))
    ]
    return sorted((_remote_file(scheme, info, not matches) for info in selected), key=lambda file: file.name)


def _as_regex(pattern: str) -> str:
    """Translate a `glob` pattern: `*` matches within a folder, `**` across folders."""
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        wildcards.get(token) or (fnmatch.translate(token)[4:-3] if token.startswith("[") else re.escape(token))
        for token in tokens
    )


def _remote_file(scheme: str, info: Any, from_listing: bool = False) -> File:
    return File(scheme + info.path, info.path, int(info.size or 0), str(info.mtime_ns or ""), from_listing)


def _remote_filesystem(scheme: str) -> Any:
    """Return a pyarrow file system with short timeouts; credentials, region and endpoint come from the environment."""
    import pyarrow.fs as fs

    if scheme == "gs://":
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=CONNECT_TIMEOUT_S))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return fs.S3FileSystem(
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=4 * CONNECT_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
        endpoint_override=endpoint,
        region=os.environ.get("AWS_REGION")
        or os.environ.get("AWS_DEFAULT_REGION")
        or ("us-east-1" if endpoint else None),
    )


def open_stream(file: File) -> _Stream:
    """Open a decompressed stream of a file, to be used as a context manager. Raises UnavailableFile."""
    return _Stream(file) if file.span is None else _SpanStream(file, file.span)


def open_seekable(file: File) -> IO[bytes]:
    """Open a file for random access; a compressed one is first decompressed into a temporary file.

    Raises UnavailableFile, and CorruptFile if the compressed data is corrupt.
    """
    if not file.endings[1]:
        return _open_raw(file)
    with ExitStack() as stack:
        unpacked = stack.enter_context(tempfile.TemporaryFile())
        with open_stream(file) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                unpacked.write(chunk)
        unpacked.seek(0)
        stack.pop_all()  # the caller closes it
        return unpacked


def _open_raw(file: File) -> IO[bytes]:
    try:
        if file.is_remote:
            return io.BufferedReader(
                _RemoteFile(file.name, _remote_filesystem(file.name[:5]).open_input_file(file.path)), 1 << 20
            )
        return open(file.path, "rb")
    except OSError as error:
        raise UnavailableFile(f"`{file.name}`: {_reason(error)}") from error


class _RemoteFile(io.RawIOBase):
    """An Arrow file that raises UnavailableFile, so that a lost connection is not reported as a corrupt file."""

    def __init__(self, name: str, file: Any) -> None:
        self._name, self._file = name, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        try:
            chunk = self._file.read(len(buffer))
        except OSError as error:
            raise UnavailableFile(f"`{self._name}`: {_reason(error)}") from error
        buffer[: len(chunk)] = chunk
        return len(chunk)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())


class _Stream:
    """A sequential stream of a file. A corrupt compressed file yields every byte before the corruption, then raises
    CorruptFile."""

    def __init__(self, file: File) -> None:
        self._name, self._codec = file.name, COMPRESSED.get(file.endings[1])
        self._raw = _open_raw(file)
        self._position = 0
        self._error: CorruptFile | None = None
        self._unpacked = self._unpack() if self._codec else None

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def read(self, size: int, /) -> bytes:
        if self._error is not None:
            raise self._error
        try:
            chunk: bytes = (self._unpacked or self._raw).read(size)
        except OSError as error:
            if self._unpacked is None:
                raise UnavailableFile(f"`{self._name}`: {_reason(error)}") from error
            self._error = CorruptFile(f"the compressed file is corrupt: {_reason(error)}")
            chunk = b"".join(self._rest())
            if not chunk:
                raise self._error from error
        self._position += len(chunk)
        return chunk

    def _unpack(self) -> Any:
        import pyarrow as pa

        raw, codec = cast(io.IOBase, self._raw), cast(Any, self._codec)
        return pa.CompressedInputStream(pa.PythonFile(raw, "r"), codec)

    def _rest(self) -> Iterator[bytes]:
        """Yield the bytes between the last complete chunk and the corruption. A failed read returns none of them, so
        the file is read again byte by byte."""
        self._raw.seek(0)
        stream = self._unpack()
        remaining = self._position
        try:
            while remaining and (chunk := stream.read(min(remaining, CHUNK_BYTES))):
                remaining -= len(chunk)
            while byte := stream.read(1):
                yield byte
        except OSError:
            return


class _SpanStream(_Stream):
    """The complete lines that start within a byte range."""

    def __init__(self, file: File, span: ByteRange) -> None:
        super().__init__(file)
        assert self._codec is None, "a compressed file can't be split"
        self._span, self._at, self._done = span, max(0, span.begin - 1), False
        # The byte before the range shows whether a line starts at its beginning.
        self._skipping = span.begin > 0
        self._raw.seek(self._at)

    def read(self, size: int, /) -> bytes:
        while not self._done:
            chunk, start = super().read(size), self._at
            if not chunk:
                break
            self._at += len(chunk)
            if self._skipping:
                newline = chunk.find(b"\n")
                self._skipping = newline < 0
                start, chunk = start + newline + 1, b"" if newline < 0 else chunk[newline + 1 :]
                self._done = self._at >= self._span.end if self._skipping else start >= self._span.end
            if self._done:
                break
            if self._at >= self._span.end:
                last = chunk.find(b"\n", max(0, self._span.end - 1 - start))
                if last >= 0:
                    chunk, self._done = chunk[: last + 1], True
            if chunk:
                self._span.lines += chunk.count(b"\n")
                return chunk
        return b""


def _reason(error: OSError) -> str:
    """Return the first sentence of a library's error message."""
    text = error.strerror or str(error).strip() or type(error).__name__
    if re.search("resolve host", text):
        return "no network: the host's name can't be resolved"
    return re.split(r"(?<=[^.])\. |\n|; Details", text)[0][:300]
