"""Locations of rows: files, folders, lists, saved datasets, S3, Google Cloud Storage, the Hugging Face hub."""

from __future__ import annotations

import gzip
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from reading import build_dataset, dataset

from tunery.errors import RequestError, StageError
from tunery.ingest import filesystem
from tunery.ingest.filesystem import File, UnavailableFile, find
from tunery.ingest.formats import hub
from tunery.ingest.formats.hub import AmbiguousDataset, streamed
from tunery.ingest.read import first_row_format, read_source, validate_source
from tunery.ingest.sources import BadSource, source_identity
from tunery.store.rows import read_rows


def row(response: str) -> str:
    return json.dumps({"question": "q", "answer": response}) + "\n"


def write_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(row(name))


def sources(folder: Path, source: Any, **fields: Any) -> list[str]:
    return [row["source"] for row in read_source(dataset(source, **fields), folder, pytest.fail)]


# Local files.


def test_folder_includes_all_visible_files_with_known_endings(tmp_path: Path) -> None:
    write_files(tmp_path, "data/b.jsonl", "data/deep/er/a.jsonl", "data/a.json")
    write_files(
        tmp_path, "data/README.md", "data/.hidden.jsonl", "data/.git/x.jsonl", "data/_tmp/y.jsonl", "data/_SUCCESS"
    )
    expected = ["data/a.json", "data/b.jsonl", "data/deep/er/a.jsonl"]
    assert (
        sources(tmp_path, "data")
        == sources(tmp_path, "data/")
        == sources(tmp_path, ("data", "data/*.json"))
        == expected
    )
    assert sources(tmp_path, str(tmp_path / "data")) == expected


def test_list_of_sources_is_read_in_order_and_each_file_once(tmp_path: Path) -> None:
    write_files(tmp_path, "a.jsonl", "b.jsonl", "c/d.jsonl")
    assert sources(tmp_path, ("b.jsonl", "*.jsonl", "c")) == ["b.jsonl", "a.jsonl", "c/d.jsonl"]
    with pytest.raises(BadSource, match=r"there is no file `e.jsonl`"):
        validate_source(dataset(("a.jsonl", "e.jsonl")), tmp_path)


def test_existing_file_name_takes_precedence_over_a_pattern(tmp_path: Path) -> None:
    write_files(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert sources(tmp_path, "a[1].jsonl") == ["a[1].jsonl"]
    assert sources(tmp_path, "a[12].jsonl") == ["a1.jsonl"]


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_files(tmp_path, "a.jsonl")
    assert sources(tmp_path / "elsewhere", "~/a.jsonl") == [str(tmp_path / "a.jsonl")]


def test_configured_format_overrides_the_ending(tmp_path: Path) -> None:
    (tmp_path / "rows.data").write_text("question;answer\nq;a\n")
    (tmp_path / "rows.data.gz").write_bytes(gzip.compress(b"question,answer\nq,a\n"))
    assert sources(tmp_path, "rows.*", format="csv") == ["rows.data", "rows.data.gz"]


def test_many_files_are_one_dataset(tmp_path: Path) -> None:
    write_files(tmp_path, *(f"data/{n:04}.jsonl" for n in range(600)))
    result, out = build_dataset(tmp_path, "out", dataset("data/*.jsonl"))
    assert result.facts["rows"] == 600
    assert [row["source"] for row in read_rows(out)] == [f"data/{n:04}.jsonl" for n in range(600)]


def test_file_without_read_permission_is_an_error_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, "a.jsonl")

    def deny(file: File) -> Any:
        raise UnavailableFile("`a.jsonl`: Permission denied")

    monkeypatch.setattr(filesystem, "_open_raw", deny)
    with pytest.raises(BadSource, match="Permission denied"):
        validate_source(dataset(), tmp_path)


def test_disk_error_while_reading_fails_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, "a.jsonl")

    class FailingFile:
        def read(self, size: int) -> bytes:
            raise OSError(5, "Input/output error")

        def close(self) -> None:
            pass

    monkeypatch.setattr(filesystem, "_open_raw", lambda file: FailingFile())
    with pytest.raises(StageError, match="Input/output error"):
        build_dataset(tmp_path, "out", dataset())


# Datasets saved with Hugging Face's library.


def test_saved_dataset_is_read_in_order(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict(
        {"question": [f"q{n}" for n in range(30)], "answer": [f"a{n}" for n in range(30)]}
    )
    rows.save_to_disk(str(tmp_path / "saved"), num_shards=3)
    read = list(read_source(dataset("saved"), tmp_path, pytest.fail))
    assert [item["messages"][1]["content"] for item in read] == [f"a{n}" for n in range(30)]
    assert read[-1]["source"] == "saved/data-00002-of-00003.arrow"


def test_saved_dataset_with_several_splits_requires_hub_split(tmp_path: Path) -> None:
    import datasets

    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")})
    saved.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(BadSource, match="several splits") as caught:
        validate_source(dataset("saved"), tmp_path)
    assert (caught.value.field, caught.value.cause) == ("hub_split", "known: train, test")
    (test_row,) = read_source(dataset("saved", hub_split="test"), tmp_path, pytest.fail)
    assert test_row["text"] == "test"


# S3, from a server that implements the part of its API that reading uses.


class Bucket(BaseHTTPRequestHandler):
    files: ClassVar[dict[str, bytes]] = {}
    denied: ClassVar[bool] = False

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length", str(len(body))))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        content = self.files.get(urllib.parse.urlsplit(self.path).path.lstrip("/"))
        if content is None:
            self._send(404)
        else:
            self._send(200, length=str(len(content)), Last_Modified="Mon, 23 Nov 2026 05:00:00 GMT", ETag='"e"')

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query)
        if "list-type" in query:
            bucket, prefix = url.path.strip("/"), query.get("prefix", [""])[0]
            names = [
                name.removeprefix(f"{bucket}/") for name in sorted(self.files) if name.startswith(f"{bucket}/{prefix}")
            ]
            items = "".join(
                f"<Contents><Key>{name}</Key><Size>{len(self.files[f'{bucket}/{name}'])}</Size>"
                "<LastModified>2026-11-23T05:00:00.000Z</LastModified></Contents>"
                for name in names
            )
            count = f"<IsTruncated>false</IsTruncated><KeyCount>{len(names)}</KeyCount>"
            body = f"<ListBucketResult>{count}{items}</ListBucketResult>"
            self._send(200, body.encode(), Content_Type="application/xml")
            return
        content = self.files[url.path.lstrip("/")]
        if self.denied:
            self._send(403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
            return
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = content[int(first) : int(last) + 1]
        content_range = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        self._send(206, part, Content_Range=content_range, Last_Modified="Mon, 23 Nov 2026 05:00:00 GMT", ETag='"e"')


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Bucket]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    Bucket.files, Bucket.denied = {}, False
    yield Bucket
    server.shutdown()
    server.server_close()


def as_parquet(*responses: str) -> bytes:
    out = pa.BufferOutputStream()
    pq.write_table(pa.table({"question": ["q"] * len(responses), "answer": list(responses)}), out)
    return bytes(out.getvalue().to_pybytes())


def test_files_patterns_and_folders_of_s3_are_read(bucket: type[Bucket], tmp_path: Path) -> None:
    bucket.files = {
        "b/x/one.jsonl": row("a").encode() * 3,
        "b/x/two.jsonl.gz": gzip.compress(row("b").encode()),
        "b/x/deep/three.parquet": as_parquet("c", "d"),
        "b/x/notes.md": b"# notes",
        "b/xy/other.jsonl": row("e").encode(),
    }
    first, second, third = "s3://b/x/one.jsonl", "s3://b/x/two.jsonl.gz", "s3://b/x/deep/three.parquet"
    assert sources(tmp_path, first) == [first] * 3
    assert sources(tmp_path, "s3://b/x/*.jsonl*") == [first] * 3 + [second]
    assert sources(tmp_path, "s3://b/x/**/*.parquet") == [third] * 2
    assert sources(tmp_path, "s3://b/x") == sources(tmp_path, "s3://b/x/") == [third] * 2 + [first] * 3 + [second]
    validate_source(dataset("s3://b/x"), tmp_path)
    assert first_row_format(dataset("s3://b/x/*/three.parquet"), tmp_path) == "conversation"


def test_identity_of_a_remote_file_is_size_and_time(bucket: type[Bucket], tmp_path: Path) -> None:
    bucket.files = {"b/one.jsonl": row("a").encode()}
    before = source_identity(dataset("s3://b/one.jsonl"), tmp_path)
    assert before == source_identity(dataset("s3://b/one.jsonl"), tmp_path)
    bucket.files = {"b/one.jsonl": row("aa").encode()}
    assert before != source_identity(dataset("s3://b/one.jsonl"), tmp_path)


def test_missing_remote_file_is_an_error(bucket: type[Bucket], tmp_path: Path) -> None:
    with pytest.raises(BadSource, match=r"there is no file `s3://b/nothing.jsonl`"):
        validate_source(dataset("s3://b/nothing.jsonl"), tmp_path)


def test_remote_file_without_permission_fails_the_stage(bucket: type[Bucket], tmp_path: Path) -> None:
    bucket.files, bucket.denied = {"b/one.jsonl": row("a").encode()}, True
    with pytest.raises(BadSource, match=r"s3://b/one.jsonl"):
        validate_source(dataset("s3://b/one.jsonl"), tmp_path)
    with pytest.raises(StageError, match=r"s3://b/one.jsonl"):
        build_dataset(tmp_path, "out", dataset("s3://b/one.jsonl"))


def test_unreachable_server_is_an_error_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(BadSource) as caught:
        validate_source(dataset("s3://b/one.jsonl"), tmp_path)
    assert "credentials" in caught.value.remedy
    with pytest.raises(RequestError):
        source_identity(dataset("s3://b/one.jsonl"), tmp_path)


def test_files_of_google_cloud_storage_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, "bucket/a.jsonl", "bucket/deep/b.jsonl")
    local = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(filesystem, "_remote_filesystem", {"gs://": local}.__getitem__)
    assert sources(tmp_path, "gs://bucket/a.jsonl") == ["gs://bucket/a.jsonl"]
    assert sources(tmp_path, "gs://bucket/**") == ["gs://bucket/a.jsonl", "gs://bucket/deep/b.jsonl"]
    assert [file.name for file in find("gs://bucket/*.jsonl", tmp_path)] == ["gs://bucket/a.jsonl"]


# Hugging Face hub.


def test_hub_dataset_is_read_by_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    # Otherwise the library imports torch, which takes five seconds.
    monkeypatch.setattr("datasets.config.TORCH_AVAILABLE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # The library accepts a folder instead of a hub name: the same code without a network.
    write_files(tmp_path, "rows/train.jsonl", "rows/test.jsonl")
    name = str(tmp_path / "rows")
    (record,) = streamed(name, None, "test", None)
    assert (record.line, record.value) == (1, {"question": "q", "answer": "rows/test.jsonl"})
    with pytest.raises(AmbiguousDataset, match="several splits"):
        list(streamed(name, None, None, None))
    with pytest.raises(AmbiguousDataset, match="no config `x`"):
        list(streamed(name, "x", "test", None))


def test_hub_without_a_network_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub._commit.cache_clear()
    stage = dataset("hub:org/name", revision="v1")
    with pytest.raises(BadSource, match="HF_HUB_OFFLINE is set"):
        validate_source(stage, tmp_path)
    with pytest.raises(RequestError, match="hub:org/name"):
        source_identity(stage, tmp_path)
    with pytest.raises(StageError, match="hub:org/name"):
        build_dataset(tmp_path, "out", stage)


def test_identity_of_a_hub_dataset_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_commit", lambda name, revision: f"{name} at {revision}")
    assert source_identity(dataset("hub:org/name", revision="v1"), tmp_path) == ["org/name at v1"]
