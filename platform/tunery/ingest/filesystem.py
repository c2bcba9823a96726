"""Where files lie: this machine, S3 or Google Cloud Storage; finding them by path, pattern or folder, and opening them.

    corpus.jsonl   data/*.csv   data/**/*.jsonl.gz   data/            relative to the experiment's file
    s3://bucket/path/*.parquet  gs://bucket/folder/                   with the credentials of the environment

.gz and .zst are decompressed on the way. Nothing waits long for a network: a few seconds, then an error.
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
SECONDS = 5
"""How long a connection may take before a remote file counts as out of reach."""
PIECE = 1 << 16


class CorruptFile(Exception):
    """A file that can't be read any further; the message is the reason, for the quarantine."""


class UnavailableFile(Exception):
    """A file that is there for others, perhaps: no network, no permission, a disk that fails. No fault of its rows."""


class Bytes(Protocol):
    """What readers read from. `read` gives b"" at the end, and raises Damaged or UnavailableFile."""

    def read(self, size: int, /) -> bytes: ...


@dataclass
class ByteRange:
    """The lines of a file that start within these bytes: so that many can read a plain file of lines at once."""

    begin: int
    end: int
    lines: int = field(default=0, compare=False)
    """Counted while they are read."""


@dataclass(frozen=True)
class File:
    name: str
    """As rows name their source: relative to the experiment's folder, absolute, or with s3:// or gs://."""
    path: str
    """In its file system."""
    size: int
    version: str = ""
    """Of a remote file: when it was changed, since its content is not read to know it."""
    below_a_folder: bool = field(default=False, compare=False)
    """Found because its folder was named: it may be of another kind than rows."""
    span: ByteRange | None = field(default=None, compare=False)
    """Only these of its lines; None: all of it."""

    @property
    def is_remote(self) -> bool:
        return self.name.startswith(REMOTE)

    @property
    def endings(self) -> tuple[str, str]:
        """(what it holds, how it is compressed): (".jsonl", ".gz"); "" where there is none. In lower case."""
        stem, ending = os.path.splitext(self.name.lower())
        return (os.path.splitext(stem)[1], ending) if ending in COMPRESSED else (ending, "")

    def identity(self) -> Any:
        """What its content depends on. Of a local file every byte; a remote one is known by size and time of change."""
        if self.is_remote:
            return [self.name, self.size, self.version]
        try:
            return file_digest(Path(self.path))
        except OSError as error:
            raise UnavailableFile(f"`{self.name}`: {_reason(error)}") from error


def find(source: str, folder: Path) -> list[File]:
    """The files that a path, a pattern or a folder means, by name; empty when there is none. Raises UnavailableFile.

    Below a folder hidden files (a part of whose path starts with `.` or `_`) are left out.
    """
    return _find_remote(source) if source.startswith(REMOTE) else _find_local(source, folder)


def _find_local(source: str, folder: Path) -> list[File]:
    pattern = os.path.expanduser(source)
    # A file may have a pattern's characters in its name.
    literal = os.path.lexists(folder / pattern)
    found = [pattern] if literal else sorted(glob.glob(pattern, root_dir=folder, recursive=True))
    paths = [folder / name for name in found]
    if literal and paths[0].is_dir():
        below = (path for path in paths[0].rglob("*") if path.is_file() and _shown(path.relative_to(paths[0])))
        return [local_file(path, folder, True) for path in sorted(below)]
    return [local_file(path, folder) for path in paths if not path.is_dir()]


def local_file(path: Path, folder: Path, below_a_folder: bool = False) -> File:
    name = str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
    try:
        return File(name, str(path), path.stat().st_size, below_a_folder=below_a_folder)
    except OSError as error:
        raise UnavailableFile(f"`{name}`: {_reason(error)}") from error


def _shown(path: Path) -> bool:
    return not any(part.startswith((".", "_")) for part in path.parts)


def _find_remote(source: str) -> list[File]:
    from pyarrow.fs import FileSelector, FileType

    scheme, path = source[:5], source[5:].rstrip("/")
    system = _remote(scheme)
    fixed = re.split(r"[^/]*[*?\[]", path, maxsplit=1)[0].rstrip("/")
    try:
        if fixed == path:
            info = system.get_file_info(path)
            if info.type != FileType.Directory:
                return [] if info.type == FileType.NotFound else [_remote_file(scheme, info)]
        infos = system.get_file_info(FileSelector(fixed, allow_not_found=True, recursive=True))
    except OSError as error:
        raise UnavailableFile(f"`{source}`: {_reason(error)}") from error
    matches = re.compile(_as_regex(path)).fullmatch if fixed != path else None
    chosen = [
        info
        for info in infos
        if info.type == FileType.File
        and (matches(info.path) if matches else _shown(Path(info.path).relative_to(fixed)))
    ]
    return sorted((_remote_file(scheme, info, not matches) for info in chosen), key=lambda file: file.name)


def _as_regex(pattern: str) -> str:
    """As `glob` has it: `*` stays within a folder, `**` crosses them."""
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        known.get(piece) or (fnmatch.translate(piece)[4:-3] if piece.startswith("[") else re.escape(piece))
        for piece in pieces
    )


def _remote_file(scheme: str, info: Any, below_a_folder: bool = False) -> File:
    return File(scheme + info.path, info.path, int(info.size or 0), str(info.mtime_ns or ""), below_a_folder)


def _remote(scheme: str) -> Any:
    """pyarrow's file system, with a few seconds' patience. Credentials, region and endpoint are the environment's."""
    import pyarrow.fs as fs

    if scheme == "gs://":
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=SECONDS))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return fs.S3FileSystem(
        connect_timeout=SECONDS,
        request_timeout=4 * SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=2),
        endpoint_override=endpoint,
        region=os.environ.get("AWS_REGION")
        or os.environ.get("AWS_DEFAULT_REGION")
        or ("us-east-1" if endpoint else None),
    )


def open_stream(file: File) -> _Stream:
    """The file's bytes in order, decompressed. Use it as a context. Raises UnavailableFile."""
    return _Stream(file) if file.span is None else _SpanStream(file, file.span)


def open_seekable(file: File) -> IO[bytes]:
    """The file's bytes in any order; a compressed one is unpacked into a temporary file first.

    Raises UnavailableFile, and Damaged where the compression is.
    """
    if not file.endings[1]:
        return _open_raw(file)
    with ExitStack() as stack:
        unpacked = stack.enter_context(tempfile.TemporaryFile())
        with open_stream(file) as stream:
            while piece := stream.read(PIECE):
                unpacked.write(piece)
        unpacked.seek(0)
        stack.pop_all()  # from here on the caller closes it
        return unpacked


def _open_raw(file: File) -> IO[bytes]:
    try:
        if file.is_remote:
            return io.BufferedReader(_RemoteFile(file.name, _remote(file.name[:5]).open_input_file(file.path)), 1 << 20)
        return open(file.path, "rb")
    except OSError as error:
        raise UnavailableFile(f"`{file.name}`: {_reason(error)}") from error


class _RemoteFile(io.RawIOBase):
    """An Arrow file whose errors are UnavailableFile: a lost connection must not pass for a damaged file."""

    def __init__(self, name: str, file: Any) -> None:
        self._name, self._file = name, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        try:
            piece = self._file.read(len(buffer))
        except OSError as error:
            raise UnavailableFile(f"`{self._name}`: {_reason(error)}") from error
        buffer[: len(piece)] = piece
        return len(piece)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())


class _Stream:
    """A file's bytes in order. A damaged compressed file gives every byte before the damage, then raises Damaged."""

    def __init__(self, file: File) -> None:
        self._name, self._codec = file.name, COMPRESSED.get(file.endings[1])
        self._raw = _open_raw(file)
        self._position = 0
        self._damage: CorruptFile | None = None
        self._unpacked = self._unpack() if self._codec else None

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def read(self, size: int, /) -> bytes:
        if self._damage is not None:
            raise self._damage
        try:
            piece: bytes = (self._unpacked or self._raw).read(size)
        except OSError as error:
            if self._unpacked is None:
                raise UnavailableFile(f"`{self._name}`: {_reason(error)}") from error
            self._damage = CorruptFile(f"the compressed file is damaged: {_reason(error)}")
            piece = b"".join(self._rest())
            if not piece:
                raise self._damage from error
        self._position += len(piece)
        return piece

    def _unpack(self) -> Any:
        import pyarrow as pa

        raw, codec = cast(io.IOBase, self._raw), cast(Any, self._codec)
        return pa.CompressedInputStream(pa.PythonFile(raw, "r"), codec)

    def _rest(self) -> Iterator[bytes]:
        """What stands between the last whole piece and the damage: a failed read gives none of it, so once more, byte
        by byte."""
        self._raw.seek(0)
        stream = self._unpack()
        left = self._position
        try:
            while left and (piece := stream.read(min(left, PIECE))):
                left -= len(piece)
            while byte := stream.read(1):
                yield byte
        except OSError:
            return


class _SpanStream(_Stream):
    """Whole lines only: from the first one that starts in the span to the end of the last one that does."""

    def __init__(self, file: File, span: ByteRange) -> None:
        super().__init__(file)
        assert self._codec is None, "compressed bytes have no lines"
        self._span, self._at, self._done = span, max(0, span.begin - 1), False
        # The byte before the span tells whether a line starts with it.
        self._skipping = span.begin > 0
        self._raw.seek(self._at)

    def read(self, size: int, /) -> bytes:
        while not self._done:
            piece, start = super().read(size), self._at
            if not piece:
                break
            self._at += len(piece)
            if self._skipping:
                newline = piece.find(b"\n")
                self._skipping = newline < 0
                start, piece = start + newline + 1, b"" if newline < 0 else piece[newline + 1 :]
                self._done = self._at >= self._span.end if self._skipping else start >= self._span.end
            if self._done:
                break
            if self._at >= self._span.end:
                last = piece.find(b"\n", max(0, self._span.end - 1 - start))
                if last >= 0:
                    piece, self._done = piece[: last + 1], True
            if piece:
                self._span.lines += piece.count(b"\n")
                return piece
        return b""


def _reason(error: OSError) -> str:
    """The first sentence of what a library says."""
    text = error.strerror or str(error).strip() or type(error).__name__
    if re.search("resolve host", text):
        return "no network: the host's name can't be resolved"
    return re.split(r"(?<=[^.])\. |\n|; Details", text)[0][:300]
