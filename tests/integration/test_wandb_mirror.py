"""The W&B mirror with the real wandb, offline: checks the files that `wandb sync` would upload."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sample_run import Event, rewarded_events, sample_events, write_run
from sample_search import searched_events
from workspace import ROOT

from tunery.events.event_log import EventLog
from tunery.reporting import wandb_mirror
from tunery.reporting.wandb_mirror import WandbMirror, WandbResult
from tunery.reporting.wandb_translate import run_id
from tunery.spec import Wandb

EXPERIMENT = {"name": "quickstart", "stages": {"sft": {"kind": "sft", "learning_rate": "auto"}}}
WHOLE = run_id("quickstart")
BLOCK_BYTES = 32_768


@dataclass
class Stored:
    """A W&B run, read from its file."""

    folder: Path
    run: Any = None
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def id(self) -> str:
        return str(self.run.run_id)

    @property
    def config(self) -> dict[str, Any]:
        return {item.key: json.loads(item.value_json) for item in self.run.config.update if item.key != "_wandb"}

    @property
    def points(self) -> list[dict[str, Any]]:
        """The history without the columns that wandb adds."""
        return [{name: value for name, value in row.items() if not name.startswith("_")} for row in self.history]

    def table(self, name: str) -> dict[str, Any]:
        (path,) = (self.folder / "files" / "media" / "table").glob(f"{name}_*.table.json")
        result = json.loads(path.read_text())
        assert isinstance(result, dict)
        return result


def stored(folder: Path) -> list[Stored]:
    """Return all runs under `folder`/wandb by start time. Waits up to 20 s for W&B's service process to finish them."""
    files = sorted((folder / "wandb").glob("*run-*/run-*.wandb"))
    runs, deadline = [read(path) for path in files], time.time() + 20
    while not all(run.run and run.exit_code is not None for run in runs) and time.time() < deadline:
        time.sleep(0.1)
        runs = [read(path) for path in files]
    return sorted(runs, key=lambda run: run.run.start_time.ToNanoseconds())


def read(path: Path) -> Stored:
    from wandb.proto.wandb_internal_pb2 import Record

    run = Stored(path.parent)
    for data in records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        match record.WhichOneof("record_type"):
            case "run":
                run.run = run.run or record.run
            case "history":
                run.history.append(items(record.history.item))
            case "summary":
                run.summary |= items(record.summary.update)
            case "metric":
                run.axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
            case "exit":
                run.exit_code = record.exit.exit_code
    return run


def items(told: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in told}


def records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log: after wandb's 7-byte header, (crc, length, type) and the data of each
    fragment."""
    index, parts = 7, b""
    while index + 7 <= len(data):
        if BLOCK_BYTES - index % BLOCK_BYTES < 7:
            index += BLOCK_BYTES - index % BLOCK_BYTES
            continue
        _, length, kind = struct.unpack("<IHB", data[index : index + 7])
        parts += data[index + 7 : index + 7 + length]
        index += 7 + length
        if kind in (1, 4):  # a complete record, or its last fragment
            yield parts
            parts = b""


def mirror(folder: Path, events: list[Event], mode: Any = "offline") -> WandbResult:
    """Do what a command does: start the mirror, write the events of the last invocation, close the mirror."""
    write_run(folder, events[: last_invocation(events)])
    mirrored = WandbMirror(Wandb(project="p", mode=mode, log_texts=True), "quickstart", folder, EXPERIMENT)
    mirrored.start()
    write_run(folder, events)
    return mirrored.close()


@pytest.fixture(scope="module", autouse=True)
def _no_settings_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


def last_invocation(events: list[Event]) -> int:
    return max(index for index, event in enumerate(events) if event["event"] == "run_started")


def told_points(events: list[Event], stage: str, trial: str = "") -> list[dict[str, Any]]:
    """Return the metrics of a stage as W&B has them: for steps that a resumed training repeats, the first values."""
    prefix = f"{stage}/" if trial else ""
    points: dict[Any, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "metrics" and (event["stage"], event.get("trial", "")) == (stage, trial):
            values = {"step": event["step"], **event["values"]}
            points.setdefault((event["step"], *values), {prefix + name: value for name, value in values.items()})
    return [*points.values()]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, WandbResult, list[Stored], list[Event]]:
    """The mirror of the last invocation of the synthetic run: earlier events are in the log, but not in W&B."""
    folder, events = tmp_path_factory.mktemp("run"), sample_events()
    folder.joinpath("report.html").write_text("<p>the report</p>")
    done = mirror(folder, events)
    return folder, done, stored(folder), events


def test_one_run_per_stage_trial_and_experiment_in_one_group(sample: Any) -> None:
    folder, done, runs, _ = sample
    assert Counter(run.run.job_type for run in runs) == {
        "pretrain": 1,
        "score": 1,
        "select": 1,
        "sft": 2,
        "evaluate": 1,
        "trial": 12,
        "comparison": 1,
    }
    assert {run.run.run_group for run in runs} == {"quickstart"}
    assert {run.run.project for run in runs} == {"p"}
    assert {"quickstart", "quickstart/sft", "t00"} <= {run.run.display_name for run in runs}
    assert done == WandbResult("offline", str(folder / "wandb"), runs=19)
    assert done.notes == [f"W&B (offline): wandb sync {folder / 'wandb'}"]


def test_history_is_the_points_of_the_event_log(sample: Any) -> None:
    _, _, runs, events = sample
    by_name = {run.run.display_name: run for run in runs}
    for stage in ("base", "sft", "raw"):
        assert by_name[f"quickstart/{stage}"].points == told_points(events, stage), stage
    for trial in {event["trial"] for event in events if event["event"] == "trial_started"}:
        assert by_name[trial].points == told_points(events, "sft", trial), trial
    times = [e["t"] for e in events if e["event"] == "metrics" and e["stage"] == "sft" and "trial" not in e]
    assert [row["_timestamp"] for row in by_name["quickstart/sft"].history] == times


def test_curves_have_the_step_as_x_axis(sample: Any) -> None:
    by_name = {run.run.display_name: run for run in sample[2]}
    assert by_name["quickstart/sft"].axes["*"] == "step"
    assert by_name["t00"].axes["sft/*"] == "sft/step"


def test_config_facts_and_exit_codes_are_logged(sample: Any) -> None:
    _, _, runs, events = sample
    by_name = {run.run.display_name: run for run in runs}
    assert by_name["quickstart/sft"].config["learning_rate"] == "auto"
    assert by_name["quickstart/sft"].summary["eval_loss"] == pytest.approx(3.19)
    trial = next(event for event in events if event["event"] == "trial_finished" and event["state"] == "failed")
    failed = by_name[trial["trial"]]
    assert failed.config == trial["overrides"]
    assert (failed.summary["state"], failed.exit_code) == ("failed", 1)
    assert Counter(run.exit_code for run in runs) == {0: 18, 1: 1}


def test_experiment_run_has_tables_histograms_numbers_and_the_report(sample: Any) -> None:
    _, _, runs, events = sample
    whole = next(run for run in runs if run.id == WHOLE)
    comparison = next(event for event in events if event["event"] == "comparison")
    table = whole.table("result")
    assert (table["columns"], table["data"]) == (comparison["columns"], comparison["rows"])
    trials = whole.table("leaderboard")
    assert trials["columns"][:4] == ["trial", "state", "rank", "eval.sft.domain.loss"]
    assert "sft.learning_rate" in trials["columns"]
    assert len(trials["data"]) == 12
    assert whole.summary["result.sft.domain loss"] == 3.191
    assert whole.summary["clean.injected_corruption.recall"] == 0.755
    assert whole.summary["scored.scores.perplexity.histogram._type"] == "histogram"
    assert whole.config["stages"] == EXPERIMENT["stages"]
    report = whole.folder / "files" / "report.html"
    assert report.read_text() == "<p>the report</p>"
    assert not report.is_symlink()


def test_responses_before_and_after_are_a_table_of_the_stage(tmp_path: Path) -> None:
    mirror(tmp_path, rewarded_events())
    by_name = {run.run.display_name: run for run in stored(tmp_path)}
    table = by_name["quickstart/ppo"].table("responses")
    assert table["columns"] == ["prompt", "before", "after", "reward before", "reward after"]
    assert [row[3:] for row in table["data"]] == [[0.5, 4.0]] * 4
    assert by_name["quickstart/wins"].table("responses")["data"][0][2] == "It is a <b>string</b>."
    assert by_name["quickstart/ppo"].points[1]["rollout_tokens_per_second"] == 2_100.0


def test_search_is_in_the_files_as_tables_and_each_trial_as_a_run_with_its_tags(tmp_path: Path) -> None:
    mirror(tmp_path, searched_events(10))
    by_name = {run.run.display_name: run for run in stored(tmp_path)}
    again = by_name["r00"]
    assert ([*again.run.tags], again.config["of"], again.config["sft.seed"]) == (["replicate"], "t00", 1017)
    assert [*by_name["t00"].run.tags] == []
    assert sum(run.run.job_type == "trial" for run in by_name.values()) == 12
    whole = by_name["quickstart"]
    for name in ("leaderboard", "importance", "parallel_coordinates", "pareto_front", "funnel", "filter_samples"):
        assert whole.table(name)["data"], name
    board = whole.table("leaderboard")
    best = dict(zip(board["columns"], board["data"][0], strict=True))
    assert (best["trial"], best["ci_half_width"], best["seeds"]) == ("t00", 0.0123, 2)


def test_two_mirrors_of_one_log_write_to_the_same_runs(sample: Any, tmp_path: Path) -> None:
    _, _, runs, events = sample
    mirror(tmp_path / "run", events)
    again = stored(tmp_path / "run")
    assert {run.id for run in again} == {run.id for run in runs}
    assert len({run.id for run in again}) == 19


def test_resumed_command_continues_the_same_runs_without_duplicate_points(tmp_path: Path) -> None:
    folder, events = tmp_path / "run", sample_events()
    second = last_invocation(events)
    until = next(
        i for i, event in enumerate(events) if event["event"] == "stage_finished" and event["stage"] == "clean"
    )
    mirror(folder, events[:second])
    before = stored(folder)
    mirror(folder, events[: until + 1])
    pieces = [run for run in stored(folder) if run.run.display_name == "quickstart/base"]
    assert len(pieces) == 2
    assert pieces[0].id == pieces[1].id
    assert all(run.run.resume for run in pieces), "`wandb sync` appends the second to the first"
    assert [*pieces[0].points, *pieces[1].points] == told_points(events[: until + 1], "base")
    again = {point["step"] for point in pieces[0].points} & {
        event["step"] for event in events[second:until] if event["event"] == "metrics" and event["stage"] == "base"
    }
    assert again, "the resumed training measured some steps again, as after a checkpoint"
    steps = [row["_step"] for piece in pieces for row in piece.history]
    assert steps == [*range(len(steps))]
    assert [run.exit_code for run in pieces] == [255, 0]
    docs = [run for run in stored(folder) if run.run.display_name == "quickstart/docs"]
    assert len(docs) == 1, "built by the first invocation, reused by the second"
    assert docs[0].id in {run.id for run in before}


def test_stage_is_in_wandb_while_the_run_is_active(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_mirror, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(wandb_mirror, "SETTLE_SECONDS", 0.1)
    log = EventLog(tmp_path / "events" / "driver.jsonl")
    worker = EventLog(tmp_path / "events" / "a-worker.jsonl", stage="sft")
    mirrored = WandbMirror(Wandb(mode="offline"), "quickstart", tmp_path, EXPERIMENT)
    mirrored.start()
    log.write("run_started", run="quickstart", stages=[])
    log.write("stage_started", stage="sft", kind="sft", fingerprint="f")
    worker.write("metrics", step=1, values={"loss": math.nan})
    log.write("stage_finished", stage="sft", kind="sft", fingerprint="f", reused=False, seconds=1.0, facts={})
    deadline = time.time() + 20
    while not any(run.exit_code == 0 for run in stored_so_far(tmp_path)) and time.time() < deadline:
        time.sleep(0.1)
    (sft,) = [run for run in stored_so_far(tmp_path) if run.exit_code is not None]
    (point,) = sft.points
    assert point["step"] == 1
    assert math.isnan(point["loss"])
    assert mirrored.close().runs == 2


def stored_so_far(folder: Path) -> list[Stored]:
    return [run for run in map(read, (folder / "wandb").glob("*run-*/run-*.wandb")) if run.run is not None]


def test_wandb_error_is_reported_once_and_does_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    calls = []

    def fails(**settings: Any) -> None:
        calls.append(settings["id"])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb, "init", fails)
    done = mirror(tmp_path, sample_events())
    assert len(calls) == wandb_mirror.MAX_CONSECUTIVE_FAILURES, "then W&B is left alone"
    assert done.runs == 0
    assert done.lost > 200
    assert done.error == "OSError: [Errno 28] No space left on device"
    assert len(done.notes) == 1


def test_run_without_a_network_continues_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    real = wandb.init

    def unreachable(**settings: Any) -> Any:
        if settings["mode"] == "online":
            raise wandb.errors.CommError("no network")
        return real(**settings)

    monkeypatch.setattr(wandb, "init", unreachable)
    monkeypatch.setattr(wandb_mirror, "has_key", lambda: True)
    done = mirror(tmp_path, sample_events(), mode="auto")
    assert (done.mode, done.lost) == ("offline", 0)
    assert done.error == "CommError: no network; written offline from then on"
    assert len(stored(tmp_path)) == done.runs


def test_without_a_key_auto_is_offline_and_online_reports_it(tmp_path: Path) -> None:
    log = [{"t": 1.0, "event": "run_started", "run": "quickstart", "stages": []}]
    auto = mirror(tmp_path / "auto", log, mode="auto")
    assert (auto.mode, auto.error) == ("offline", "")
    online = mirror(tmp_path / "online", log, mode="online")
    assert online.mode == "offline"
    assert "wandb login" in online.error


SCRIPT = """
import sys
from pathlib import Path
from sample_run import sample_events, write_run
from tunery.spec import Wandb
from tunery.reporting.wandb_mirror import WandbMirror

mirror = WandbMirror(Wandb(project="p", mode=sys.argv[2]), "quickstart", Path(sys.argv[1]), {})
mirror.start()
events = sample_events()
write_run(Path(sys.argv[1]), events[max(i for i, event in enumerate(events) if event["event"] == "run_started") :])
Path(sys.argv[1], "report.html").touch()
done = mirror.close()
assert done.runs == int(sys.argv[3]), done
assert ("wandb" in sys.modules) == (done.runs > 0)
"""


def run_script(folder: Path, mode: str, runs: int, **environment: str) -> tuple[str, list[Path]]:
    """Run the script in a separate process. Returns its output and the files in its home directory."""
    home = folder / "home"
    home.mkdir()
    paths = os.pathsep.join([str(ROOT / "platform"), str(ROOT / "tests" / "support")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder / "run"), mode, str(runs)],
        env={**os.environ, "HOME": str(home), "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        cwd=home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr, [path for path in home.rglob("*") if path.is_file()]


def test_offline_mode_is_silent_and_stays_in_the_run_folder(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        proxies = {"HTTPS_PROXY": address, "HTTP_PROXY": address, "WANDB_API_KEY": "0" * 40}
        printed, elsewhere = run_script(tmp_path, "offline", 19, **proxies)
        with pytest.raises(TimeoutError):
            server.accept()
    assert printed == ""
    assert elsewhere == []
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"events", "report.html", "wandb"}


def test_disabled_does_not_import_wandb(tmp_path: Path) -> None:
    printed, _ = run_script(tmp_path, "disabled", 0)
    assert printed == ""
    assert not (tmp_path / "run" / "wandb").exists()


def test_environment_can_disable_it(tmp_path: Path) -> None:
    run_script(tmp_path, "auto", 0, WANDB_MODE="disabled")
    assert not (tmp_path / "run" / "wandb").exists()
