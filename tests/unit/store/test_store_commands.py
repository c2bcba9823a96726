"""`tunery store ls`, `verify` and `gc` on real stores."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import tunery
from tunery.errors import RequestError, TuneryError
from tunery.events.event_log import EventLog, read_events
from tunery.store import Lease, Store, new_output_dir
from tunery.store import lease as lease_module
from tunery.store_commands.artifact_list import list_artifacts
from tunery.store_commands.garbage_collection import GcResult, collect_garbage
from tunery.store_commands.integrity import Verification, verify_artifacts
from tunery.store_commands.store_views import gc_lines, list_lines, names_in_width, verify_lines

FORK = multiprocessing.get_context("fork")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(tunery.__file__).parents[1])}


def fingerprint(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


class StoreWithRuns:
    """A store in which artifacts are named by words."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root)

    def artifact(self, kind: str, name: str, inputs: Sequence[str] = (), size: int = 10, **facts: Any) -> Path:
        inputs_by_field = {f"data.{index}": fingerprint(word) for index, word in enumerate(inputs)}
        key = {"kind": kind, "fingerprint": fingerprint(name), "identity": {}, "inputs": inputs_by_field}
        with self.store.lease(kind, fingerprint(name)) as lease:
            out = new_output_dir(self.store.staging_dir(kind, fingerprint(name)), lease)
            (out / "rows").mkdir()
            (out / "rows" / "part-00000.parquet").write_bytes(b"x" * size)
            artifact = self.store.commit(out, {**key, "facts": facts}, {"seconds": 1.0}, lease)
        (self.store.root / "work" / artifact.path.name).rmdir()
        return artifact.path

    def run(self, run: str, *stages: tuple[str, str], trials: Sequence[str] = (), finished: bool = True) -> None:
        """Write the event log of a run with these stages, (kind, name), and trials."""
        log = EventLog(self.store.run(run) / "events" / "driver.jsonl")
        log.write("run_started", run=run, text="name: x\n", stages=[])
        for kind, name in stages:
            log.write("stage_started", stage=name, kind=kind, fingerprint=fingerprint(name), detail="")
        for trial in trials:
            log.write("trial_finished", trial=trial, state="done")
        if finished:
            log.write("run_finished", state="done", seconds=1.0, message="")

    def work_dir(self, kind: str, name: str, size: int = 100) -> Path:
        folder = self.store.staging_dir(kind, fingerprint(name))
        (folder / "checkpoints" / "checkpoint-4").mkdir(parents=True)
        (folder / "checkpoints" / "checkpoint-4" / "weights").write_bytes(b"x" * size)
        return folder

    def files(self) -> dict[str, int]:
        """Return the modification times of all files and folders."""
        return {str(path): path.lstat().st_mtime_ns for path in sorted(self.store.root.rglob("*"))}

    @property
    def artifacts(self) -> list[str]:
        return sorted(path.name.split("-")[0] for path in self.store.artifacts.iterdir())


@pytest.fixture
def stored(tmp_path: Path) -> StoreWithRuns:
    return StoreWithRuns(tmp_path / "store")


@pytest.fixture
def hold() -> Iterator[Callable[[Path], int]]:
    """Return a function that starts a process which holds a lease, and returns its pid."""
    processes = []

    def hold_lease(path: Path, held: Any) -> None:
        with Lease(path):
            held.set()
            time.sleep(600)

    def start(path: Path) -> int:
        held = FORK.Event()
        process = FORK.Process(target=hold_lease, args=(path, held))
        process.start()
        processes.append(process)
        assert held.wait(timeout=30)
        assert process.pid is not None
        return process.pid

    yield start
    for process in processes:
        process.kill()
        process.join()


def command(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tunery", *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def removed(result: GcResult) -> list[tuple[str, str]]:
    return [(removal.what, removal.path.name.split("-")[0]) for removal in result.removals]


# ls.


def test_artifacts_are_listed_with_the_runs_that_refer_to_them(stored: StoreWithRuns) -> None:
    stored.artifact("dataset", "rows", size=1000)
    stored.artifact("sft", "tuned", ["rows"], size=5000)
    stored.artifact("sft", "other", ["rows"])
    stored.run("second", ("dataset", "rows"))
    stored.run("first", ("dataset", "rows"), ("sft", "tuned"))
    listing = list_artifacts(stored.store)
    assert {(item.kind, item.fingerprint): item.runs for item in listing.artifacts} == {
        ("dataset", fingerprint("rows")): ("first", "second"),
        ("sft", fingerprint("tuned")): ("first",),
        ("sft", fingerprint("other")): (),
    }
    sizes = {item.fingerprint: item.bytes for item in listing.artifacts}
    assert 5000 < sizes[fingerprint("tuned")] < 6000
    assert all(0 <= time.time() - item.created < 60 for item in listing.artifacts)
    assert [item.kind for item in list_artifacts(stored.store, kind="sft").artifacts] == ["sft", "sft"]


def test_artifacts_are_sorted_by_name_size_or_age(stored: StoreWithRuns) -> None:
    for age, (kind, size) in enumerate((("b", 3000), ("c", 1000), ("a", 2000))):
        path = stored.artifact(kind, kind, size=size)
        os.utime(path / "checksums.json", (10**9 - age, 10**9 - age))
    kinds = {
        order: [item.kind for item in list_artifacts(stored.store, order=order).artifacts]
        for order in ("name", "size", "age")
    }
    assert kinds == {"name": ["a", "b", "c"], "size": ["b", "a", "c"], "age": ["a", "c", "b"]}


def test_search_is_listed_with_the_runs_that_have_its_trials(stored: StoreWithRuns) -> None:
    stored.artifact("search", "tune", trials=[{"trial": "trial-01234567"}])
    stored.run("with", trials=["trial-01234567"])
    stored.run("without", trials=["trial-89abcdef"])
    (search,) = list_artifacts(stored.store).artifacts
    assert search.runs == ("with",)


@pytest.mark.parametrize("width", [80, 200])
def test_listing_fits_the_terminal(width: int, stored: StoreWithRuns) -> None:
    stored.artifact("dataset", "rows")
    stored.artifact("classifier", "one")
    for number in range(30):
        stored.run(f"run-with-a-long-name-{number}", ("dataset", "rows"))
    stored.run("one-" + "x" * 200, ("classifier", "one"))
    lines = list(list_lines(list_artifacts(stored.store), width))
    assert lines[0].split() == ["kind", "fingerprint", "size", "age", "runs"]
    assert all(len(line) <= width for line in lines[:3])
    assert lines[1].endswith("…")
    assert fingerprint("one")[:8] in lines[1]
    assert "run-with-a-long-name-0, +29" in lines[2] or ", +" in lines[2]
    assert lines[3].startswith("2 artifacts, ")
    assert len(lines) == 4


def test_listing_for_a_program_is_complete(stored: StoreWithRuns) -> None:
    stored.artifact("dataset", "rows")
    names = sorted(f"run-with-a-long-name-{number:02d}" for number in range(30))
    for name in names:
        stored.run(name, ("dataset", "rows"))
    shown = command("store", "ls", "--store", str(stored.store.root))
    assert shown.stdout.splitlines()[1].endswith(", ".join(names))
    assert fingerprint("rows") in shown.stdout
    listed = json.loads(command("store", "ls", "--json", "--store", str(stored.store.root)).stdout)
    (item,) = listed["artifacts"]
    assert (item["kind"], item["runs"], Path(item["path"]).is_dir()) == ("dataset", names, True)


def test_names_are_shortened_to_a_width() -> None:
    assert names_in_width([], 10) == "-"
    assert names_in_width(["one", "two"], 8) == "one, two"
    assert names_in_width(["one", "two", "three"], 9) == "one, +2"
    assert names_in_width(["a-long-name", "two"], 9) == "a-lo…, +1"


def test_folder_that_is_not_a_store_is_rejected(tmp_path: Path) -> None:
    for run in (list_artifacts, verify_artifacts, collect_garbage):
        with pytest.raises(RequestError, match="is not a store") as rejected:
            run(Store(tmp_path / "absent"))
        assert "--store" in rejected.value.remedy
    assert list(tmp_path.iterdir()) == []


# verify.


def damage(verification: Verification) -> dict[str, tuple[str, ...]]:
    (artifact,) = verification.damaged
    kinds = ("unreadable", "missing", "changed", "additional")
    return {kind: files for kind in kinds if (files := getattr(artifact, kind))}


def test_unchanged_artifacts_are_verified(stored: StoreWithRuns) -> None:
    stored.artifact("dataset", "rows", size=1000)
    stored.artifact("sft", "tuned", size=3_000_000)
    verification = verify_artifacts(stored.store)
    assert len(verification.artifacts) == 2
    assert verification.damaged == verification.without_checksums == []
    assert 3_001_000 < verification.bytes < 3_002_000
    verification.raise_if_damaged()
    assert verify_lines(verification)[-1].startswith("2 artifacts ok, 0 damaged; read 2.9 MiB")


SHARD = "rows/part-00000.parquet"


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: (path / SHARD).unlink(), {"missing": (SHARD,)}),
        (lambda path: flip_bit(path / SHARD), {"changed": (SHARD,)}),
        (lambda path: (path / SHARD).write_bytes(b""), {"changed": (SHARD,)}),
        (lambda path: (path / "rows" / "new").touch(), {"additional": ("rows/new",)}),
        (
            lambda path: (path / "manifest.json").unlink(),
            {"unreadable": ("manifest.json",), "missing": ("manifest.json",)},
        ),
        (lambda path: (path / "runtime_stats.json").write_text("{"), {"unreadable": ("runtime_stats.json",)}),
        (lambda path: (path / "checksums.json").write_text('{"bytes": 10, '), {"unreadable": ("checksums.json",)}),
    ],
    ids=["missing", "flipped bit", "empty", "additional", "manifest", "runtime stats", "checksums"],
)
def test_damage_is_reported_with_a_remedy(
    change: Callable[[Path], object], expected: dict[str, tuple[str, ...]], stored: StoreWithRuns
) -> None:
    path = stored.artifact("dataset", "rows", size=1000)
    stored.artifact("sft", "tuned")
    change(path)
    verification = verify_artifacts(stored.store)
    assert damage(verification) == expected
    assert verify_lines(verification)[0].startswith(f"{path.name}: ")
    with pytest.raises(TuneryError, match="1 of 2 artifacts are damaged") as error:
        verification.raise_if_damaged()
    assert error.value.exit_code == 1
    assert f"delete these folders ({path})" in error.value.remedy


def test_artifact_of_an_earlier_version_has_no_checksums_and_is_not_damaged(stored: StoreWithRuns) -> None:
    path = stored.artifact("dataset", "rows")
    (path / "checksums.json").unlink()
    assert stored.store.find("dataset", fingerprint("rows")) is not None
    verification = verify_artifacts(stored.store)
    assert verification.damaged == []
    assert verify_lines(verification) == [
        "no checksums: 1 artifact of earlier versions, which can't be verified",
        f"  {path.name}",
        "0 artifacts ok, 0 damaged; read 0 B",
    ]


def test_only_requested_artifacts_are_verified(stored: StoreWithRuns) -> None:
    rows = stored.artifact("dataset", "rows")
    stored.artifact("sft", "tuned")
    flip_bit(rows / SHARD)
    assert verify_artifacts(stored.store, [fingerprint("tuned")[:8]]).damaged == []
    assert len(verify_artifacts(stored.store, ["dataset", fingerprint("rows")]).damaged) == 1
    with pytest.raises(RequestError, match="no artifact `zz`"):
        verify_artifacts(stored.store, ["zz"])
    stored.artifact("sft", "other")
    with pytest.raises(RequestError, match="`sft-` matches 2 artifacts"):
        verify_artifacts(stored.store, ["sft-"])


def test_exit_code_and_json_of_verify(stored: StoreWithRuns) -> None:
    path = stored.artifact("dataset", "rows")
    option = ("--store", str(stored.store.root))
    assert command("store", "verify", *option).returncode == 0
    flip_bit(path / SHARD)
    process = command("store", "verify", "--json", *option)
    assert process.returncode == 1
    assert process.stderr.startswith("error: 1 of 1 artifacts are damaged\n")
    assert json.loads(process.stdout)["artifacts"][0]["changed"] == [SHARD]
    assert command("store", "verify", "zz", *option).returncode == 2


# gc.


def test_artifacts_that_no_run_refers_to_are_removed_and_inputs_of_the_others_are_kept(stored: StoreWithRuns) -> None:
    stored.artifact("dataset", "rows")
    stored.artifact("select", "clean", ["rows"])
    stored.artifact("sft", "tuned", ["clean"])
    unused = stored.artifact("reward", "unused", ["rows"], size=5000)
    stored.run("run", ("sft", "tuned"))
    freed = sum(path.stat().st_size for path in unused.rglob("*") if path.is_file())
    result = collect_garbage(stored.store)
    assert ("artifact", "reward") in removed(result)
    assert result.bytes == freed
    assert stored.artifacts == ["dataset", "select", "sft"]


def test_dry_run_prints_the_same_and_writes_nothing(stored: StoreWithRuns) -> None:
    stored.artifact("dataset", "rows")
    stored.artifact("reward", "unused")
    stored.work_dir("sft", "gone")
    stored.run("run", ("dataset", "rows"))
    (stored.store.leases / f"sft-{fingerprint('gone')}").write_text("{}")
    before = stored.files()
    planned = collect_garbage(stored.store, dry_run=True)
    assert stored.files() == before
    done = collect_garbage(stored.store)
    assert done.removals == planned.removals
    assert {what for what, _ in removed(done)} == {"artifact", "work directory", "lease", "temporary"}
    planned_lines, lines = list(gc_lines(planned)), list(gc_lines(done))
    assert lines[:2] == planned_lines[:2]
    assert planned_lines[2].startswith("would be removed: 1 artifact")
    assert lines[2].startswith("removed: 1 artifact")
    assert collect_garbage(stored.store).removals == ()


def test_removal_of_a_run_frees_its_artifacts(stored: StoreWithRuns) -> None:
    stored.artifact("dataset", "shared")
    stored.artifact("sft", "first", ["shared"])
    stored.artifact("dpo", "second", ["shared"])
    stored.run("first", ("dataset", "shared"), ("sft", "first"))
    stored.run("second", ("dataset", "shared"), ("dpo", "second"))
    assert ("artifact", "sft") not in removed(collect_garbage(stored.store))
    (stored.store.run("first") / "events" / "driver.jsonl").unlink()
    collect_garbage(stored.store)
    assert stored.artifacts == ["dataset", "dpo"]


def test_search_and_its_journal_are_kept_while_a_run_has_its_trials(stored: StoreWithRuns) -> None:
    stored.artifact("search", "done", trials=[{"trial": "trial-01234567"}])
    stored.artifact("search", "unused", trials=[{"trial": "trial-89abcdef"}])
    for name, trial in (("interrupted", "trial-01234567"), ("gone", "trial-fedcba98")):
        folder = stored.work_dir("search", name)
        (folder / "journal.jsonl").write_text(json.dumps({"event": "begun", "trial": trial}) + "\n")
    stored.run("run", trials=["trial-01234567"], finished=False)
    collect_garbage(stored.store)
    assert [path.name for path in stored.store.artifacts.iterdir()] == [f"search-{fingerprint('done')}"]
    assert os.listdir(stored.store.root / "work") == [f"search-{fingerprint('interrupted')}"]


def test_checkpoints_that_a_run_can_resume_from_are_kept_unless_requested(stored: StoreWithRuns) -> None:
    stored.artifact("dataset", "rows")
    interrupted, gone = stored.work_dir("sft", "interrupted"), stored.work_dir("sft", "gone")
    complete = stored.store.staging_dir("dataset", fingerprint("rows"))
    complete.mkdir()
    stored.run("run", ("dataset", "rows"), ("sft", "interrupted"), finished=False)
    collect_garbage(stored.store)
    assert [path.exists() for path in (interrupted, gone, complete)] == [True, False, False]
    assert ("work directory", "sft") in removed(collect_garbage(stored.store, unfinished=True))
    assert not interrupted.exists()


def test_nothing_that_an_active_run_could_reuse_is_removed(stored: StoreWithRuns, hold: Callable[[Path], int]) -> None:
    stored.artifact("dataset", "rows")
    stored.artifact("reward", "unused")
    stored.work_dir("sft", "interrupted")
    stored.work_dir("sft", "gone")
    stored.run("run", ("dataset", "rows"), ("sft", "interrupted"), finished=False)
    pid = hold(stored.store.run("run") / "lease")
    result = collect_garbage(stored.store, unfinished=True)
    assert list(result.active_runs) == ["run"]
    assert f"process {pid} " in result.active_runs["run"]
    assert removed(result) == [("work directory", "sft")], "the one that no run refers to"
    assert [removal.what for removal in result.kept if removal.bytes] == ["artifact", "work directory"]
    assert stored.artifacts == ["dataset", "reward"]
    assert any(line.startswith("active: run (process") for line in gc_lines(result))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    collect_garbage(stored.store)
    assert stored.artifacts == ["dataset"]


def test_what_a_live_process_builds_is_not_removed(stored: StoreWithRuns, hold: Callable[[Path], int]) -> None:
    stored.run("run")
    artifact, work_dir = stored.artifact("reward", "built"), stored.work_dir("reward", "built")
    hold(stored.store.leases / artifact.name)
    result = collect_garbage(stored.store)
    assert sorted(result.held) == sorted([artifact, work_dir])
    assert artifact.is_dir()
    assert work_dir.is_dir()
    assert (stored.store.leases / artifact.name).exists()


def test_leases_of_dead_owners_are_removed(stored: StoreWithRuns, hold: Callable[[Path], int]) -> None:
    stored.run("run")
    live, dead = (stored.store.leases / f"sft-{fingerprint(name)}" for name in ("live", "dead"))
    hold(live)
    pid = hold(dead)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert removed(collect_garbage(stored.store)) == [("lease", "sft")]
    assert live.exists()
    assert not dead.exists()


@pytest.mark.parametrize("sends_heartbeats", [True, False])
def test_run_on_another_host_is_active_if_it_sends_heartbeats_whatever_its_clock(
    sends_heartbeats: bool, stored: StoreWithRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "EXPIRY", 1.0)
    monkeypatch.setattr(lease_module, "POLL_SECONDS", 0.05)
    stored.artifact("reward", "unused")
    stored.run("run")
    path = stored.store.run("run") / "lease"
    path.write_text(json.dumps({"token": "t", "host": "elsewhere", "pid": 1, "start": "1"}))
    os.utime(path, (10**9, 10**9))
    messages: list[str] = []
    stop = threading.Event()

    def send_heartbeats() -> None:
        beat = 0
        while sends_heartbeats and not stop.wait(0.1):
            beat += 1
            os.utime(path, (10**9 + beat, 10**9 + beat))

    thread = threading.Thread(target=send_heartbeats)
    thread.start()
    result = collect_garbage(stored.store, notify=messages.append)
    stop.set()
    thread.join()
    assert list(result.active_runs) == (["run"] if sends_heartbeats else [])
    assert stored.artifacts == (["reward"] if sends_heartbeats else [])
    assert messages[0] == "waiting for a heartbeat of process 1 on elsewhere"


def test_run_that_starts_waits_until_gc_has_ended(stored: StoreWithRuns, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "e.yaml").write_text(
        "name: r\nseed: 1\nstages:\n  rows: {kind: dataset, source: rows.jsonl, split: train}\n"
        "tracking: {wandb: {mode: disabled}}\n"
    )
    with stored.store.gc_lease():
        run = subprocess.Popen(
            [sys.executable, "-m", "tunery", "run", "e.yaml", "--store", str(stored.store.root)],
            cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        lease = stored.store.run("r") / "lease"
        while not lease.exists():
            assert run.poll() is None
            time.sleep(0.05)
        time.sleep(1)
        assert not read_events(stored.store.run("r") / "events")
    assert run.wait(timeout=60) == 0
    assert stored.artifacts == ["dataset"]
    assert removed(collect_garbage(stored.store, dry_run=True)) == [("temporary", "dataset")], "a lock file"


def test_files_with_other_hard_links_free_no_space(stored: StoreWithRuns) -> None:
    kept, first, second = (stored.artifact(kind, kind, size=10_000) for kind in ("dataset", "score", "select"))
    for path in (first, second):
        (path / SHARD).unlink()
    os.link(kept / SHARD, first / SHARD)
    os.link(kept / SHARD, second / SHARD)
    stored.run("run", ("dataset", "dataset"))
    assert collect_garbage(stored.store, dry_run=True).bytes < 10_000
    stored.run("run", ("score", "score"))
    (stored.store.run("run") / "events" / "driver.jsonl").write_text("")
    assert 10_000 < collect_garbage(stored.store, dry_run=True).bytes < 20_000


def test_store_without_runs_is_not_emptied(stored: StoreWithRuns) -> None:
    stored.artifact("dataset", "rows")
    with pytest.raises(RequestError, match="has no run, so all of its 1 artifacts would be removed"):
        collect_garbage(stored.store)
    assert stored.artifacts == ["dataset"]


def test_caches_runs_and_files_of_others_are_kept(stored: StoreWithRuns) -> None:
    stored.run("run")
    root = stored.store.root
    kept = ["scores/0123/run/b0-000000.arrow", "tokenized/0123/stats.json", "artifacts/notes.txt", "work/mine/a", "b/c"]
    leftovers = ["scores/0123/.run.0123456789abcdef/b0-000000.spill", "tokenized/.0123.0123456789abcdef/tokens.bin",
                 "artifacts/.deleted-0123/sft-0123/manifest.json"]  # fmt: skip
    for name in (*kept, *leftovers):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    assert len(collect_garbage(stored.store).removals) == 3
    assert [name for name in (*kept, *leftovers) if (root / name).exists()] == kept
    assert (stored.store.run("run") / "events" / "driver.jsonl").exists()


def test_truncated_artifact_of_a_run_is_kept_for_the_run_to_rebuild(stored: StoreWithRuns) -> None:
    path = stored.artifact("dataset", "rows")
    (path / "manifest.json").write_text("{")
    stored.run("run", ("dataset", "rows"))
    collect_garbage(stored.store)
    assert path.is_dir()
    assert stored.artifact("dataset", "rows") == path
    assert verify_artifacts(stored.store).damaged == []


def test_gc_command_prints_what_it_removes_and_the_bytes(stored: StoreWithRuns) -> None:
    unused = stored.artifact("reward", "unused", size=5000)
    stored.run("run")
    option = ("--store", str(stored.store.root))
    process = command("store", "gc", *option)
    assert process.returncode == 0, process.stderr
    assert f"artifacts/{unused.name}  (no run refers to it)" in process.stdout
    assert "removed: 1 artifact" in process.stdout
    assert "freed" in process.stdout
    assert json.loads(command("store", "gc", "--json", *option).stdout)["removed"] == []
