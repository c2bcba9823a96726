"""The store: artifacts are complete or absent, and each is built by one process at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tunery.errors import StoreError
from tunery.store import Artifact, Lease, LeaseHeld, Store
from tunery.store import artifacts as artifacts_module
from tunery.store import lease as lease_module
from tunery.store.lease import EXPIRY

FORK = multiprocessing.get_context("fork")


def manifest(fingerprint: str = "0123", **facts: Any) -> dict[str, Any]:
    return {"kind": "dataset", "fingerprint": fingerprint, "identity": {}, "inputs": {}, "facts": facts}


def make(store: Store, fingerprint: str = "0123", content: str = "rows", **facts: Any) -> Artifact:
    out = store.staging_dir("dataset", fingerprint) / "out"
    out.mkdir(parents=True)
    (out / "rows.txt").write_text(content)
    return store.commit(out, manifest(fingerprint, **facts), {"seconds": 1.5})


# Artifacts.


def test_committed_artifact_is_found_with_all_that_was_said_about_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.find("dataset", "0123") is None
    made = make(store, rows=3, loss=float("inf"))
    found = Store(tmp_path).find("dataset", "0123")
    assert found == made
    assert found is not None
    assert (found.kind, found.fingerprint) == ("dataset", "0123")
    assert found.facts == {"rows": 3, "loss": float("inf"), "seconds": 1.5}
    assert (found.path / "rows.txt").read_text() == "rows"
    assert not (store.staging_dir("dataset", "0123") / "out").exists()


def test_artifacts_of_other_kinds_and_fingerprints_are_others(tmp_path: Path) -> None:
    store = Store(tmp_path)
    make(store, "01")
    assert store.find("dataset", "02") is None
    assert store.find("score", "01") is None


def test_manifest_is_the_same_for_everybody_who_makes_the_artifact(tmp_path: Path) -> None:
    one, other = make(Store(tmp_path / "a"), rows=3), make(Store(tmp_path / "b"), rows=3)
    assert (one.path / "manifest.json").read_bytes() == (other.path / "manifest.json").read_bytes()


def test_remains_of_a_half_deleted_artifact_are_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path)
    made = make(store, content="old")
    (made.path / "manifest.json").unlink()
    assert store.find("dataset", "0123") is None
    assert (make(store, content="new").path / "rows.txt").read_text() == "new"


def make_until(step: str, root: Path) -> None:
    """Make an artifact and die of SIGKILL inside `step`."""

    def die(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    whole = artifacts_module._write_json

    def write_half(path: Path, value: dict[str, Any]) -> None:
        if path.name == step:
            path.write_text('{"kind": "data')
            die()
        whole(path, value)

    artifacts_module._write_json = write_half
    if step == "sync":
        artifacts_module._sync_tree = die
    if step == "rename":
        Path.rename = die
    store = Store(root)
    with store.lease("dataset", "0123"):
        if step == "rows":
            (store.staging_dir("dataset", "0123") / "out").mkdir(parents=True)
            die()
        make(store, content="half")


@pytest.mark.parametrize("step", ["rows", "runtime_stats.json", "manifest.json", "sync", "rename"])
def test_maker_killed_at_any_step_leaves_no_artifact_and_the_next_one_makes_it(step: str, tmp_path: Path) -> None:
    child = FORK.Process(target=make_until, args=(step, tmp_path))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    store = Store(tmp_path)
    assert store.find("dataset", "0123") is None
    with store.lease("dataset", "0123"):  # nobody waits for the dead
        shutil.rmtree(store.staging_dir("dataset", "0123"))
        make(store, content="whole")
    found = store.find("dataset", "0123")
    assert found is not None
    assert (found.path / "rows.txt").read_text() == "whole"


def test_reader_never_sees_a_part_of_an_artifact_while_it_is_committed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    seen: list[int] = []
    stop = threading.Event()

    def read() -> None:
        reader = Store(tmp_path)
        while not stop.is_set():
            for number in range(20):
                if (found := reader.find("dataset", f"{number:04d}")) is not None:
                    content = (found.path / "rows.txt").read_text()
                    seen.append(int(found.facts["size"] == len(content) and "seconds" in found.facts))

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(20):
        make(store, f"{number:04d}", "x" * 5000, size=5000)
    time.sleep(0.05)
    stop.set()
    thread.join()
    assert seen
    assert all(seen)


# Is the store writable?


def test_new_store_can_be_made_below_a_folder_and_the_question_leaves_nothing_behind(tmp_path: Path) -> None:
    Store(tmp_path / "a" / "b").check_writable()
    assert list(tmp_path.iterdir()) == []


def test_store_below_a_file_is_refused_with_the_file_and_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "store" / "deep"):
        with pytest.raises(StoreError, match="can't be a folder") as caught:
            Store(root).check_writable()
        assert str(tmp_path / "file") in caught.value.cause
        assert "--store" in caught.value.remedy
        assert Store(root).find("dataset", "0123") is None


def test_store_on_a_read_only_file_system_is_refused() -> None:
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    read_only = (Path(where) for _, where, _, options, *_ in mounts if "ro" in options.split(","))
    place = next((path for path in read_only if path.is_dir() and os.statvfs(path).f_flag & os.ST_RDONLY), None)
    if place is None:
        pytest.skip("nothing is mounted read-only here")
    with pytest.raises(StoreError, match="can't be written"):
        Store(place / "store").check_writable()


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["read only", "closed"])
def test_store_in_a_folder_without_permission_is_refused(mode: int) -> None:
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o755)
        closed = Path(above) / "closed"
        (closed / "inner").mkdir(parents=True)
        closed.chmod(mode)

        def ask(answer: Any) -> None:
            if os.geteuid() == 0:
                os.setuid(65534)  # root may write anywhere
            try:
                Store(closed / "inner" / "store" if mode == 0 else closed / "store").check_writable()
                answer.send("writable")
            except StoreError as error:
                answer.send(str(error))

        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=ask, args=(theirs,))
        process.start()
        theirs.close()
        said = ours.recv()
        process.join()
        closed.chmod(0o755)
    assert "can't be written" in said
    assert f"no permission to write in {closed}" in said


# Leases.


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let those who wait ask again sooner than once a second."""
    real = time.sleep

    def set_pause(seconds: float) -> None:
        monkeypatch.setattr(lease_module.time, "sleep", lambda _: real(seconds))

    return set_pause


def _hold(path: Path, held: Any) -> None:
    with Lease(path):
        held.set()
        time.sleep(600)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[int]:
    """The id of another process that holds the lease tmp_path/lease."""
    held = FORK.Event()
    process = FORK.Process(target=_hold, args=(tmp_path / "lease", held))
    process.start()
    assert process.pid is not None
    assert held.wait(timeout=30)
    yield process.pid
    process.kill()
    process.join()


def foreign(path: Path, age: float, **owner: Any) -> None:
    """A lease that somebody took and touched `age` seconds ago."""
    known = {"token": "t", "host": "elsewhere", "pid": os.getpid(), "start": lease_module._process_start(os.getpid())}
    path.write_text(json.dumps(known | owner))
    os.utime(path, (time.time() - age,) * 2)


def test_lease_is_given_back_after_use_and_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "leases" / "lease"
    with Lease(path):
        assert path.exists()
    assert not path.exists()
    with pytest.raises(ZeroDivisionError), Lease(path):
        raise ZeroDivisionError
    with Lease(path):
        pass


def test_living_holder_keeps_out_others_and_is_named(holder: int, tmp_path: Path) -> None:
    with pytest.raises(LeaseHeld) as caught, Lease(tmp_path / "lease"):
        pass
    assert caught.value.holder == f"process {holder} on {lease_module._host()}"


def test_second_holder_waits_until_the_first_gives_back(tmp_path: Path, quick: Callable[[float], None]) -> None:
    quick(0.01)
    told: list[str] = []
    first = Lease(tmp_path / "lease")
    first.__enter__()

    def wait(who: str) -> None:
        told.append(who)
        if len(told) == 3:
            first.__exit__(None, None, None)

    with Lease(tmp_path / "lease", wait):
        assert len(told) == 3
    assert str(os.getpid()) in told[0]


def test_waiting_can_be_given_up(holder: int, tmp_path: Path) -> None:
    def give_up(who: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Lease(tmp_path / "lease", give_up):
        pass
    with pytest.raises(LeaseHeld), Lease(tmp_path / "lease"):
        pass


@pytest.mark.parametrize("reaped", [True, False], ids=["gone", "zombie"])
def test_lease_of_a_killed_process_is_taken_over_at_once(holder: int, reaped: bool, tmp_path: Path) -> None:
    os.kill(holder, signal.SIGKILL)
    os.waitid(os.P_PID, holder, os.WEXITED | (0 if reaped else os.WNOWAIT))
    with Lease(tmp_path / "lease"):
        pass


def test_stopped_process_keeps_its_lease_however_long_it_sleeps(holder: int, tmp_path: Path) -> None:
    os.kill(holder, signal.SIGSTOP)  # as a laptop does that is closed over night
    os.utime(tmp_path / "lease", (time.time() - 10 * EXPIRY,) * 2)
    with pytest.raises(LeaseHeld), Lease(tmp_path / "lease"):
        pass


def test_reused_process_id_is_not_taken_for_the_former_owner(tmp_path: Path) -> None:
    foreign(tmp_path / "lease", 0, host=lease_module._host(), pid=os.getpid(), start="1")
    with Lease(tmp_path / "lease"):
        pass


def test_heartbeat_of_another_host_counts_until_it_expires(tmp_path: Path) -> None:
    foreign(tmp_path / "lease", EXPIRY - 10)
    with pytest.raises(LeaseHeld, match="on elsewhere"), Lease(tmp_path / "lease"):
        pass
    foreign(tmp_path / "lease", EXPIRY + 10)
    with Lease(tmp_path / "lease"):
        pass


def test_holder_touches_its_lease_while_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT", 0.01)
    with Lease(tmp_path / "lease"):
        os.utime(tmp_path / "lease", (0, 0))
        deadline = time.time() + 5
        while (tmp_path / "lease").stat().st_mtime < 1 and time.time() < deadline:
            time.sleep(0.01)
        assert time.time() - (tmp_path / "lease").stat().st_mtime < 5


def test_holder_that_lost_its_lease_leaves_the_new_holders_alone(tmp_path: Path) -> None:
    with Lease(tmp_path / "lease"):
        foreign(tmp_path / "lease", 0)
    assert json.loads((tmp_path / "lease").read_text())["host"] == "elsewhere"


def test_unreadable_lease_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "lease").write_text('{"token": "a')
    with Lease(tmp_path / "lease"):
        pass


def _contend(path: Path, start: Any, done: Any, won: Any) -> None:
    start.wait()
    try:
        with Lease(path):
            won.put(os.getpid())
            done.wait()  # hold it until all have tried
    except LeaseHeld:
        won.put(None)
        done.wait()


@pytest.mark.parametrize("how", ["dead", "free", "expired"])
def test_exactly_one_of_many_contenders_wins(how: str, tmp_path: Path) -> None:
    contenders, rounds = 4, 4
    for number in range(rounds):
        path = tmp_path / f"lease{number}"
        if how == "dead":
            foreign(path, 0, host=lease_module._host(), pid=os.getpid(), start="1")
        elif how == "expired":
            foreign(path, EXPIRY + 1)
        start, done, won = FORK.Barrier(contenders), FORK.Event(), FORK.Queue()
        processes = [FORK.Process(target=_contend, args=(path, start, done, won)) for _ in range(contenders)]
        for process in processes:
            process.start()
        outcomes = [won.get(timeout=30) for _ in processes]
        done.set()
        for process in processes:
            process.join()
        assert len([winner for winner in outcomes if winner is not None]) == 1


def _count(path: Path, counter: Path, times: int) -> None:
    pause = time.sleep
    lease_module.time.sleep = lambda _: pause(0.002)
    for _ in range(times):
        with Lease(path, lambda holder: None):
            counter.write_text(str(int(counter.read_text()) + 1))


def test_holders_never_overlap(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    processes = [FORK.Process(target=_count, args=(tmp_path / "lease", counter, 15)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert counter.read_text() == "45"
