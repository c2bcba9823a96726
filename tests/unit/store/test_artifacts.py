"""The store: artifacts are complete or absent, and each is built by one process at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tunery.errors import StoreError
from tunery.interrupt import STOP, BackgroundCall
from tunery.store import Artifact, Lease, LeaseHeld, LeaseLost, Store, new_output_dir
from tunery.store import artifacts as artifacts_module
from tunery.store import lease as lease_module
from tunery.store.lease import EXPIRY

FORK = multiprocessing.get_context("fork")


def manifest(fingerprint: str = "0123", **facts: Any) -> dict[str, Any]:
    return {"kind": "dataset", "fingerprint": fingerprint, "identity": {}, "inputs": {}, "facts": facts}


def commit_artifact(store: Store, fingerprint: str = "0123", content: str = "rows", **facts: Any) -> Artifact:
    with store.lease("dataset", fingerprint) as lease:
        return build(store, lease, fingerprint, content, **facts)


def build(store: Store, lease: Lease, fingerprint: str = "0123", content: str = "rows", **facts: Any) -> Artifact:
    out = new_output_dir(store.staging_dir("dataset", fingerprint), lease)
    (out / "rows.txt").write_text(content)
    return store.commit(out, manifest(fingerprint, **facts), {"seconds": 1.5}, lease)


# Artifacts.


def test_committed_artifact_is_found_with_its_facts_and_runtime_stats(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.find("dataset", "0123") is None
    committed = commit_artifact(store, rows=3, loss=float("inf"))
    artifact = Store(tmp_path).find("dataset", "0123")
    assert artifact == committed
    assert artifact is not None
    assert (artifact.kind, artifact.fingerprint) == ("dataset", "0123")
    assert artifact.facts == {"rows": 3, "loss": float("inf"), "seconds": 1.5}
    assert (artifact.path / "rows.txt").read_text() == "rows"
    assert not [*store.staging_dir("dataset", "0123").iterdir()]


def test_artifact_is_found_by_kind_and_fingerprint_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    commit_artifact(store, "01")
    assert store.find("dataset", "02") is None
    assert store.find("score", "01") is None


def test_manifest_does_not_depend_on_the_store(tmp_path: Path) -> None:
    first, second = commit_artifact(Store(tmp_path / "a"), rows=3), commit_artifact(Store(tmp_path / "b"), rows=3)
    assert (first.path / "manifest.json").read_bytes() == (second.path / "manifest.json").read_bytes()


def test_partially_deleted_artifact_is_rebuilt(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old = commit_artifact(store, content="old")
    (old.path / "manifest.json").unlink()
    assert store.find("dataset", "0123") is None
    assert (commit_artifact(store, content="new").path / "rows.txt").read_text() == "new"


def commit_and_die_at(step: str, root: Path) -> None:
    """Build and commit an artifact; the process kills itself with SIGKILL at `step`."""

    def die(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    replace = Path.replace

    def replace_or_die(path: Path, target: Path) -> Path:
        return die() if target.name == step else replace(path, target)

    Path.replace = replace_or_die
    if step == "sync":
        artifacts_module.sync_folders = die
    if step == "rename":
        Path.rename = die
    store = Store(root)
    with store.lease("dataset", "0123") as lease:
        if step == "rows":
            new_output_dir(store.staging_dir("dataset", "0123"), lease)
            die()
        build(store, lease, content="first")


@pytest.mark.parametrize("step", ["rows", "runtime_stats.json", "manifest.json", "checksums.json", "sync", "rename"])
def test_process_killed_while_committing_leaves_no_artifact_and_the_next_one_builds_it(
    step: str, tmp_path: Path
) -> None:
    child = FORK.Process(target=commit_and_die_at, args=(step, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    store = Store(tmp_path)
    assert store.find("dataset", "0123") is None
    with store.lease("dataset", "0123") as lease:  # not held any more: its owner is dead
        build(store, lease, content="second")
    assert not [*store.staging_dir("dataset", "0123").iterdir()], "the output of the dead owner was removed"
    artifact = store.find("dataset", "0123")
    assert artifact is not None
    assert (artifact.path / "rows.txt").read_text() == "second"


def test_concurrent_reader_finds_only_complete_artifacts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    complete: list[bool] = []
    stop = threading.Event()

    def read() -> None:
        reader = Store(tmp_path)
        while not stop.is_set():
            for number in range(20):
                if (artifact := reader.find("dataset", f"{number:04d}")) is not None:
                    content = (artifact.path / "rows.txt").read_text()
                    complete.append(artifact.facts["size"] == len(content) and "seconds" in artifact.facts)

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(20):
        commit_artifact(store, f"{number:04d}", "x" * 5000, size=5000)
    time.sleep(0.05)
    stop.set()
    thread.join()
    assert complete
    assert all(complete)


def test_owner_that_has_lost_its_lease_does_not_commit_or_mix_its_files_with_those_of_the_new_one(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    with store.lease("dataset", "0123") as former:
        former_out = new_output_dir(store.staging_dir("dataset", "0123"), former)
        write_lease(former.path, 0, host="elsewhere")  # taken over while this process was paused
        new = Lease(former.path)
        new.token = "t"  # the owner of the lease that was written above
        new_out = new_output_dir(store.staging_dir("dataset", "0123"), new)
        (new_out / "rows.txt").write_text("new")
        former_out.mkdir(parents=True, exist_ok=True)
        (former_out / "rows.txt").write_text("former")
        with pytest.raises(LeaseLost, match="another process has taken over dataset-0123: process") as lost:
            store.commit(former_out, manifest(), {}, former)
        assert "run the same command again" in lost.value.remedy
        assert store.find("dataset", "0123") is None
        committed = store.commit(new_out, manifest(), {}, new)
        assert (committed.path / "rows.txt").read_text() == "new"
        former_out.mkdir(parents=True, exist_ok=True)
        late = store.commit(former_out, manifest(), {}, former)
        assert late.path == committed.path, "the result of the new owner is used"
        assert (late.path / "rows.txt").read_text() == "new"


# Check that the store is writable.


def test_check_of_a_new_store_passes_and_creates_nothing(tmp_path: Path) -> None:
    Store(tmp_path / "a" / "b").check_writable()
    assert list(tmp_path.iterdir()) == []


def test_store_below_a_file_is_rejected_with_the_file_and_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "store" / "deep"):
        with pytest.raises(StoreError, match="can't be a folder") as caught:
            Store(root).check_writable()
        assert str(tmp_path / "file") in caught.value.cause
        assert "--store" in caught.value.remedy
        assert Store(root).find("dataset", "0123") is None


def test_store_on_a_read_only_file_system_is_rejected() -> None:
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    read_only = (Path(mount_point) for _, mount_point, _, options, *_ in mounts if "ro" in options.split(","))
    folder = next((path for path in read_only if path.is_dir() and os.statvfs(path).f_flag & os.ST_RDONLY), None)
    if folder is None:
        pytest.skip("no read-only mount on this machine")
    with pytest.raises(StoreError, match="can't be written"):
        Store(folder / "store").check_writable()


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["read only", "no access"])
def test_store_in_a_folder_without_permission_is_rejected(mode: int) -> None:
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        closed = Path(parent) / "closed"
        (closed / "inner").mkdir(parents=True)
        closed.chmod(mode)

        def check(connection: Any) -> None:
            if os.geteuid() == 0:
                os.setuid(65534)  # nobody; root may write anywhere
            try:
                Store(closed / "inner" / "store" if mode == 0 else closed / "store").check_writable()
                connection.send("writable")
            except StoreError as error:
                connection.send(str(error))

        receiver, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=check, args=(sender,))
        process.start()
        sender.close()
        message = receiver.recv()
        process.join()
        closed.chmod(0o755)
    assert "can't be written" in message
    assert f"no permission to write in {closed}" in message


@pytest.mark.parametrize("url", ["s3://bucket/store", "gs://bucket", "hdfs://name/store"])
def test_object_store_is_rejected_with_what_to_give_instead(url: str) -> None:
    with pytest.raises(StoreError, match=f"the store can't be {url}") as rejected:
        Store(Path(url)).check_writable()
    assert "shared storage" in rejected.value.remedy


# Leases.


@pytest.fixture
def set_poll_interval(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that sets how often a waiting process tries to acquire a lease, instead of once a second."""
    real = time.sleep

    def set_seconds(seconds: float) -> None:
        monkeypatch.setattr(lease_module.time, "sleep", lambda _: real(seconds))

    return set_seconds


def _hold(path: Path, held: Any) -> None:
    with Lease(path):
        held.set()
        time.sleep(600)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """Start a process that holds the lease tmp_path/lease, and return its pid."""
    held = FORK.Event()
    process = FORK.Process(target=_hold, args=(tmp_path / "lease", held))
    process.start()
    assert process.pid is not None
    assert held.wait(timeout=30)
    yield process.pid
    process.kill()
    process.join()


def write_lease(path: Path, age: float, **owner: Any) -> None:
    """Write a lease whose last heartbeat was `age` seconds ago; `owner` replaces fields of the default owner."""
    defaults = {
        "token": "t",
        "host": "elsewhere",
        "pid": os.getpid(),
        "start": lease_module._process_start(os.getpid()),
    }
    path.write_text(json.dumps(defaults | owner))
    os.utime(path, (time.time() - age,) * 2)


def test_lease_is_released_after_use_and_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "leases" / "lease"
    with Lease(path):
        assert path.exists()
    assert not path.exists()
    with pytest.raises(ZeroDivisionError), Lease(path):
        raise ZeroDivisionError
    with Lease(path):
        pass


def test_lease_of_a_live_process_is_held_and_names_it(holder: int, tmp_path: Path) -> None:
    with pytest.raises(LeaseHeld) as caught, Lease(tmp_path / "lease"):
        pass
    assert caught.value.holder == f"process {holder} on {socket.gethostname()}"


def test_second_holder_waits_until_the_first_releases_the_lease(
    tmp_path: Path, set_poll_interval: Callable[[float], None]
) -> None:
    set_poll_interval(0.01)
    owners: list[str] = []
    first = Lease(tmp_path / "lease")
    first.__enter__()

    def wait(owner: str) -> None:
        owners.append(owner)
        if len(owners) == 3:
            first.__exit__(None, None, None)

    with Lease(tmp_path / "lease", wait):
        assert len(owners) == 3
    assert str(os.getpid()) in owners[0]


def test_wait_for_a_lease_can_be_interrupted(holder: int, tmp_path: Path) -> None:
    def interrupt(owner: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Lease(tmp_path / "lease", interrupt):
        pass
    with pytest.raises(LeaseHeld), Lease(tmp_path / "lease"):
        pass


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_lease_of_a_killed_process_is_taken_over_immediately(holder: int, reaped: bool, tmp_path: Path) -> None:
    os.kill(holder, signal.SIGKILL)
    os.waitid(os.P_PID, holder, os.WEXITED | (0 if reaped else os.WNOWAIT))
    with Lease(tmp_path / "lease"):
        pass


def test_stopped_process_keeps_its_lease_beyond_the_expiry(holder: int, tmp_path: Path) -> None:
    os.kill(holder, signal.SIGSTOP)  # like a laptop that is suspended overnight
    os.utime(tmp_path / "lease", (time.time() - 10 * EXPIRY,) * 2)
    with pytest.raises(LeaseHeld), Lease(tmp_path / "lease"):
        pass


def test_reused_process_id_is_not_taken_for_the_former_owner(tmp_path: Path) -> None:
    write_lease(tmp_path / "lease", 0, host=lease_module._host(), pid=os.getpid(), start="1")
    with Lease(tmp_path / "lease"):
        pass


def test_recent_heartbeat_of_another_host_holds_the_lease(tmp_path: Path) -> None:
    write_lease(tmp_path / "lease", EXPIRY - 10)
    with pytest.raises(LeaseHeld, match="on elsewhere"), Lease(tmp_path / "lease"):
        pass


@pytest.fixture
def short_expiry(monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds after which an owner on another host is dead, in this test."""
    monkeypatch.setattr(lease_module, "EXPIRY", 0.5)
    monkeypatch.setattr(lease_module, "POLL_SECONDS", 0.01)
    return 0.5


@pytest.mark.parametrize("age", [3600.0, 1.0, -3600.0], ids=["clock behind", "equal clocks", "clock ahead"])
def test_lease_of_another_host_is_taken_over_without_heartbeats_for_the_expiry_whatever_its_clock_says(
    age: float, tmp_path: Path, short_expiry: float
) -> None:
    write_lease(tmp_path / "lease", age)
    start = time.monotonic()
    with Lease(tmp_path / "lease"):
        assert time.monotonic() - start >= short_expiry


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_heartbeats_of_another_host_count_whatever_its_clock_says(
    skew: float, tmp_path: Path, short_expiry: float
) -> None:
    beats: list[float] = []

    def wait(owner: str) -> None:
        beats.append(time.monotonic())
        if beats[-1] - beats[0] > 4 * short_expiry:
            raise TimeoutError
        os.utime(tmp_path / "lease", (time.time() + skew + len(beats),) * 2)  # a heartbeat of the other host

    write_lease(tmp_path / "lease", -skew)
    with pytest.raises(TimeoutError), Lease(tmp_path / "lease", wait):
        pass


def test_host_of_the_same_name_is_another_host(tmp_path: Path) -> None:
    name, boot, *rest = lease_module._host().split()
    assert len(boot) == 36
    other = " ".join([name, "0" * 36, *rest])
    write_lease(tmp_path / "lease", 0, host=other, pid=2**22 + 1, start="1")  # this host has no such process
    with pytest.raises(LeaseHeld, match=f"process {2**22 + 1} on {name}"), Lease(tmp_path / "lease"):
        pass


def test_holder_updates_the_heartbeat_of_its_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT", 0.01)
    with Lease(tmp_path / "lease"):
        os.utime(tmp_path / "lease", (0, 0))
        deadline = time.time() + 5
        while (tmp_path / "lease").stat().st_mtime < 1 and time.time() < deadline:
            time.sleep(0.01)
        assert time.time() - (tmp_path / "lease").stat().st_mtime < 5


def test_next_wait_of_a_holder_that_has_lost_its_lease_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT", 0.01)
    end = threading.Event()
    training = BackgroundCall(end.wait)
    with Lease(tmp_path / "lease"):
        STOP.check()
        write_lease(tmp_path / "lease", 0, host="elsewhere")
        with pytest.raises(LeaseLost, match="another process has taken over lease"):
            training.wait(30)
    end.set()
    STOP.check()

    with Lease(tmp_path / "other"):
        (tmp_path / "other").unlink()  # as if the file system were unavailable
        time.sleep(0.1)
        STOP.check()


def test_release_of_a_lease_that_was_taken_over_does_not_delete_it(tmp_path: Path) -> None:
    with Lease(tmp_path / "lease"):
        write_lease(tmp_path / "lease", 0)
    assert json.loads((tmp_path / "lease").read_text())["host"] == "elsewhere"


def test_unreadable_lease_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "lease").write_text('{"token": "a')
    with Lease(tmp_path / "lease"):
        pass


def _compete(path: Path, start: Any, done: Any, results: Any) -> None:
    start.wait()
    try:
        with Lease(path):
            results.put(os.getpid())
            done.wait()  # hold the lease until all processes have tried
    except LeaseHeld:
        results.put(None)
        done.wait()


@pytest.mark.parametrize("lease", ["of a dead process", "absent", "expired"])
def test_exactly_one_of_several_concurrent_processes_gets_the_lease(
    lease: str, tmp_path: Path, short_expiry: float
) -> None:
    num_processes = 4
    for number in range(4):
        path = tmp_path / f"lease{number}"
        if lease == "of a dead process":
            write_lease(path, 0, host=lease_module._host(), pid=os.getpid(), start="1")
        elif lease == "expired":
            write_lease(path, 3600)
        start, done, results = FORK.Barrier(num_processes), FORK.Event(), FORK.Queue()
        processes = [FORK.Process(target=_compete, args=(path, start, done, results)) for _ in range(num_processes)]
        for process in processes:
            process.start()
        outcomes = [results.get(timeout=30) for _ in processes]
        done.set()
        for process in processes:
            process.join()
        assert len([pid for pid in outcomes if pid is not None]) == 1


def _increment(path: Path, counter: Path, times: int) -> None:
    real = time.sleep
    lease_module.time.sleep = lambda _: real(0.002)
    for _ in range(times):
        with Lease(path, lambda holder: None):
            counter.write_text(str(int(counter.read_text()) + 1))


def test_holders_never_overlap(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [FORK.Process(target=_increment, args=(tmp_path / "lease", counter, 15)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert counter.read_text() == "45"
