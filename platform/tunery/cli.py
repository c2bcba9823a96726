"""The commands. They have no logic: each calls one function and prints the result."""

from __future__ import annotations

import atexit
import errno
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TextIO

import typer

from tunery.errors import Interrupted, RequestError, TuneryError
from tunery.interrupt import STOP, STOP_SIGNALS, has_unfinished_calls
from tunery.store import DEFAULT_STORE

if TYPE_CHECKING:
    from tunery.jobs.cluster import JobsApi
    from tunery.pipeline.compute import Hardware
    from tunery.spec import Experiment
    from tunery.spec.yaml_source import YamlSource
    from tunery.store import Store

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Fine-tuning experiments on Ray."
)
File = Annotated[Path, typer.Argument(help="Experiment file (.yaml).", show_default=False)]
StoreOption = Annotated[
    Path, typer.Option("--store", envvar="TUNERY_STORE", help="Folder of artifacts, runs and reports.")
]
HardwareOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="HARDWARE",
        help="Hardware other than this machine: 4x8xH100-80GB (nodes x GPUs x type) or 4x16cpu (nodes x CPUs).",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _load_and_validate(
    file: Path, store: Path, hardware: Hardware | None = None
) -> tuple[Experiment, YamlSource, Store]:
    from tunery.run import validate_experiment
    from tunery.spec import load
    from tunery.store import Store as TheStore

    experiment, source = load(file)
    the_store = TheStore(store)
    return validate_experiment(experiment, source, the_store, hardware), source, the_store


def _hardware(text: str | None) -> Hardware | None:
    from tunery.pipeline.compute import parse_hardware

    return None if text is None else parse_hardware(text)


@app.command()
def validate(
    file: File, store: StoreOption = DEFAULT_STORE, hardware: HardwareOption = None, as_json: Json = False
) -> None:
    """Validate an experiment: syntax, files, models and search space. Does not start or write anything."""
    from tunery.pipeline.validate import notes
    from tunery.pipeline.validate_templates import template_notes

    experiment, source, _ = _load_and_validate(file, store, _hardware(hardware))
    messages = notes(experiment, source)
    messages += [f"`{stage}`: {note}" for stage, note in template_notes(experiment, file.parent).items()]
    if as_json:
        summary = {"file": str(file), "name": experiment.name, "stages": len(experiment.stages), "notes": messages}
        print(json.dumps(summary))
    else:
        searched = f", {experiment.search.trials} trials" if experiment.search else ""
        print(f"{file}: ok ({experiment.name}: {len(experiment.stages)} stages{searched})")
        for note in messages:
            print(f"note: {note}")


@app.command()
def plan(
    file: File, store: StoreOption = DEFAULT_STORE, hardware: HardwareOption = None, as_json: Json = False
) -> None:
    """Show the plan of a run: stages, reused artifacts, reasons for rebuilding, rows, steps, memory, time."""
    from rich.console import Console

    from tunery.pipeline.plan import render_plan
    from tunery.run import plan_experiment

    described = _hardware(hardware)
    experiment, source, the_store = _load_and_validate(file, store, described)
    planned = plan_experiment(experiment, source, the_store, described)
    if as_json:
        print(json.dumps(planned.as_json(), indent=1))
    else:
        Console(highlight=False).print(render_plan(planned))


@app.command()
def run(file: File, store: StoreOption = DEFAULT_STORE, as_json: Json = False) -> None:
    """Run an experiment. Finished stages are reused; rerun the command to resume an interrupted run."""
    experiment, source, the_store = _load_and_validate(file, store)
    from tunery.live import run_live

    summary = run_live(experiment, source, the_store, quiet=as_json)
    if as_json:
        print(json.dumps(summary.as_json(), indent=1))


@app.command("filter")
def filter_rows(
    sources: Annotated[
        list[str], typer.Argument(help="Files, folders, patterns, s3://, gs:// or hub:org/name.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="File for the rows that pass, with all columns of the source. The ending sets the format: .csv, .tsv, "
            ".jsonl, .json, .xlsx, .parquet.",
            show_default=False,
        ),
    ],
    by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCORE",
            help="A score: length=words, gopher, language=en, perplexity=./model. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE",
            help='A rule on a score: "length 3..500", "language >= 0.1", "perplexity best 80%", "random best 1000". '
            "Can be repeated.",
            show_default=False,
        ),
    ] = None,
    any_rule: Annotated[
        bool, typer.Option("--any", help="Keep rows that pass any of the rules instead of all.")
    ] = False,
    dropped: Annotated[
        Path | None,
        typer.Option(
            help="File for all other rows, including unreadable ones, with `dropped_by` and `dropped_reason`.",
            show_default=False,
        ),
    ] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Append a column for each score to both files.")] = False,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=NAME",
            help="Role of a column, if its name is not recognized, for example prompt=Frage. Roles: text, prompt, "
            "input, completion, messages, chosen, rejected, label, system, tools. Can be repeated.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Maximum number of rows to read.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the score `random`.")] = 17,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Score the rows of files and write those that pass, unchanged, to a file of the same or another format.

    The generated experiment is written next to that file.
    """
    from rich.console import Console

    from tunery.filter.filter_command import render, run_filter
    from tunery.filter.filter_experiment import FilterRequest
    from tunery.store import Store as TheStore

    request = FilterRequest(
        tuple(sources), out, tuple(by or ()), tuple(keep or ()), any_rule, tuple(column or ()), limit, seed, scores
    )
    notify = (lambda note: None) if as_json else partial(print, flush=True)
    outcome = run_filter(request, dropped, TheStore(store), quiet=as_json, notify=notify)
    if as_json:
        print(json.dumps(outcome.as_json(), indent=1))
    else:
        Console(highlight=False).print(render(outcome))


@app.command()
def review(
    file: File,
    stage: Annotated[str, typer.Argument(help="A review stage.", show_default=False)],
    store: StoreOption = DEFAULT_STORE,
    xlsx: Annotated[
        Path | None, typer.Option(help="Write the rows to this workbook instead of serving a page.", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(help="Port of the page on 127.0.0.1; 0: any free port.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
    show_filter: Annotated[
        bool,
        typer.Option(
            "--show-filter",
            help="Show score and filter decision before the reviewer decides; this biases the reviewer.",
        ),
    ] = False,
) -> None:
    """Review rows near the threshold of a filter, on a local web page or in a workbook: keep or drop."""
    experiment, source, the_store = _load_and_validate(file, store)
    from tunery.pipeline.review_command import find_review, serve_review, write_review

    pending = find_review(experiment, source, the_store, stage)
    if xlsx is not None:
        write_review(pending, xlsx, show_filter=show_filter, print_line=print)
    else:
        serve_review(
            pending, port=port, show_filter=show_filter, browser=browser, print_line=partial(print, flush=True)
        )


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run's name or folder.", show_default=False)],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Rebuild the report of a run, a self-contained HTML file."""
    from tunery.reporting.report import write_report
    from tunery.store import Store as TheStore

    print(write_report(TheStore(store).find_run(run)))


@app.command()
def preview(
    file: File,
    stage: Annotated[str, typer.Argument(help="A stage that encodes rows for a model.", show_default=False)],
    rows: Annotated[int, typer.Option(min=1, help="Number of rows.")] = 3,
    offset: Annotated[int, typer.Option(min=0, help="Number of rows to skip.")] = 0,
    row: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Show only this row; a prefix of the id is enough.", show_default=False),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print each token as id:text.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Show encoded rows: tokens, loss mask and truncation. Does not start or write anything."""
    from rich.console import Console

    from tunery.preview.preview_command import preview as preview_stage
    from tunery.preview.preview_terminal import render
    from tunery.store import Store as TheStore

    rows_preview = preview_stage(file, stage, TheStore(store), rows, offset, row)
    if as_json:
        print(json.dumps(rows_preview.as_json()))
        return
    console = Console(highlight=False)
    colours = console.is_terminal and not console.is_dumb_terminal and not console.no_color
    # If a program reads the output, lines are not wrapped to a width.
    console.print(render(rows_preview, colours=colours, ids=ids), soft_wrap=not colours)


@app.command()
def trials(
    run: Annotated[str, typer.Argument(help="A run's name or folder.", show_default=False)],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TRIAL|PATH=VALUE",
            help="With --stop: trials. With --add and --clone: values, for example sft.learning_rate=1e-3.",
            show_default=False,
        ),
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="Stop these trials.")] = False,
    add: Annotated[bool, typer.Option("--add", help="Add a trial with the file's values and these.")] = False,
    clone: Annotated[
        str | None,
        typer.Option(metavar="TRIAL", help="Add a trial with the values of TRIAL and these.", show_default=False),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """List the trials of a search; stop and add trials while it runs, from another terminal."""
    from rich.console import Console

    from tunery.search.trial_commands import trials as trials_command
    from tunery.store import Store as TheStore

    outcome = trials_command(run, TheStore(store), words or (), stop=stop, add=add, clone=clone)
    console = Console(highlight=False)
    if as_json:
        print(json.dumps(outcome.as_json(), indent=1))
    else:
        console.print(outcome.render(console.width))


@app.command()
def compare(
    left: Annotated[
        str, typer.Argument(help="A run's name or folder, RUN/TRIAL, or RUN/file.", show_default=False, metavar="RUN")
    ],
    right: Annotated[str, typer.Argument(help="The run or trial to compare with.", show_default=False, metavar="RUN")],
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Compare two runs or trials: metrics, fields that differ, and training rows that only one has."""
    from rich.console import Console

    from tunery.compare.compare_command import compare as compare_runs
    from tunery.compare.compare_command import render
    from tunery.store import Store as TheStore

    comparison = compare_runs(left, right, TheStore(store))
    if as_json:
        print(json.dumps(comparison.as_json(), indent=1))
    else:
        Console(highlight=False).print(render(comparison))


@app.command()
def export(
    run: Annotated[
        str,
        typer.Argument(metavar="FILE_OR_RUN", help="Experiment file, or name or folder of a run.", show_default=False),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must be empty or not exist.", show_default=False)],
    stage: Annotated[
        str | None,
        typer.Option(help="Stage whose model to export; by default that of the search's metric, or the last training."),
    ] = None,
    trial: Annotated[
        str | None,
        typer.Option(help="Trial whose model to export; by default the best one. `file`: the file's own values."),
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Export only the adapter, not merged into its base.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Export a run's model as a Hugging Face folder, with a model card and its lineage."""
    from tunery.export.export_command import export_model, render
    from tunery.store import Store as TheStore

    exported = export_model(run, out, TheStore(store), stage=stage, trial=trial, adapter=adapter)
    print(json.dumps(exported.as_json(), indent=1) if as_json else render(exported))


AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Address of the cluster's dashboard, such as http://HOST:8265; when not given, RAY_API_SERVER_ADDRESS or "
        "this machine.",
        show_default=False,
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Use an address that other machines can reach, without a token.")
]
JobName = Annotated[str, typer.Argument(help="Name of the job: see `tunery jobs`.", show_default=False)]


@app.command()
def submit(
    file: Annotated[
        Path | None, typer.Argument(help="Experiment file (.yaml); not with --resume.", show_default=False)
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    address: AddressOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the job has started.")] = False,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="JOB", help="Start an ended job again.", show_default=False)
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Pass an environment variable to the job. Can be repeated.", show_default=False
        ),
    ] = None,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Run an experiment on a Ray cluster: check its nodes, ship the code, start a job and follow its output."""
    from tunery.jobs.submit import resume as resume_job
    from tunery.jobs.submit import submit as submit_file
    from tunery.jobs.views import submission_lines

    api = _jobs_api(address, insecure)
    if (file is None) == (resume is None):
        raise RequestError("give an experiment file, or --resume with the name of an ended job")
    if resume is not None:
        submission = resume_job(resume, api)
    else:
        assert file is not None, "checked above"
        submission = submit_file(file, store, api, env or (), partial(print, file=sys.stderr, flush=True))
    if as_json:
        print(json.dumps(submission.as_json(), indent=1))
    else:
        print("\n".join(submission_lines(submission)), flush=True)
    if not detach and not as_json:
        _follow(api, submission.job)


@app.command()
def jobs(address: AddressOption = None, insecure: Insecure = False, as_json: Json = False) -> None:
    """List the jobs of tunery on a Ray cluster."""
    from rich.console import Console

    from tunery.jobs.views import job_json, jobs_table

    found = [job for job in _jobs_api(address, insecure).jobs() if "tunery" in (job.metadata or {})]
    if as_json:
        print(json.dumps([job_json(job) for job in found], indent=1))
    else:
        Console(highlight=False).print(jobs_table(found) if found else "no job of tunery on this cluster")


@app.command()
def status(job: JobName, address: AddressOption = None, insecure: Insecure = False, as_json: Json = False) -> None:
    """Show the status of a job and the last lines of its output."""
    from tunery.jobs.views import job_json, status_lines

    api = _jobs_api(address, insecure)
    info = api.info(job)
    if as_json:
        print(json.dumps(job_json(info), indent=1))
    else:
        print("\n".join(status_lines(info, api.logs(job))))


@app.command()
def logs(
    job: JobName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new output until the job ends.")] = False,
    address: AddressOption = None,
    insecure: Insecure = False,
) -> None:
    """Print the output of a job."""
    api = _jobs_api(address, insecure)
    if follow:
        _follow(api, job)
    else:
        print(api.logs(job), end="")


@app.command()
def stop(job: JobName, address: AddressOption = None, insecure: Insecure = False) -> None:
    """Stop a job. Its run saves its state like after Ctrl-C; `tunery submit --resume` continues it."""
    api = _jobs_api(address, insecure)
    api.info(job)
    api.stop(job)
    print(f"{job} is stopping")


def _jobs_api(address: str | None, insecure: bool) -> JobsApi:
    from tunery.jobs.cluster import JobsApi, jobs_address

    return JobsApi(jobs_address(address, insecure=insecure))


def _follow(api: JobsApi, job: str) -> None:
    """Print the output of a job until it ends; Ctrl-C detaches. Raises TuneryError if the job fails."""
    from tunery.jobs.submit import follow

    try:
        for text in follow(job, api):
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        print(
            f"\ndetached: {job} continues; `tunery logs {job} --follow` follows it, `tunery stop {job}` stops it",
            flush=True,
        )
        return
    info = api.info(job)
    if info.status != "SUCCEEDED":
        raise TuneryError(
            f"job {job} {info.status.lower()}",
            cause=info.message or "",
            remedy=f"`tunery submit --resume {job}` runs it again from its finished stages and last checkpoint",
        )


store_app = typer.Typer(no_args_is_help=True, help="List, verify and clean the artifacts of a store.")
app.add_typer(store_app, name="store")


@store_app.command("ls")
def store_ls(
    store: StoreOption = DEFAULT_STORE,
    kind: Annotated[str | None, typer.Option(help="Only artifacts of this stage kind.", show_default=False)] = None,
    sort: Annotated[
        Literal["size", "age", "name"], typer.Option(help="Order: largest first, oldest first, or by kind.")
    ] = "name",
    as_json: Json = False,
) -> None:
    """List the artifacts of a store: size, age and the runs that refer to them."""
    from rich.console import Console

    from tunery.store import Store as TheStore
    from tunery.store_commands.artifact_list import list_artifacts
    from tunery.store_commands.store_views import list_lines

    listing = list_artifacts(TheStore(store), kind=kind, order=sort)
    if as_json:
        print(json.dumps(listing.as_json(), indent=1))
    else:
        console = Console()
        print("\n".join(list_lines(listing, console.width if console.is_terminal else None)))


@store_app.command("verify")
def store_verify(
    fingerprints: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FINGERPRINT",
            help="Artifacts to verify; a unique prefix is enough. Default: all.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Recompute the checksums of artifacts. Reports missing, changed and additional files; exit code 1 if there are
    any."""
    from rich.console import Console

    from tunery.store import Store as TheStore
    from tunery.store_commands.integrity import verify_artifacts
    from tunery.store_commands.store_views import verify_lines, verify_progress

    with verify_progress(Console(stderr=True, highlight=False)) as watch:
        verification = verify_artifacts(TheStore(store), fingerprints or (), watch)
    print(
        json.dumps(verification.as_json(), indent=1) if as_json else "\n".join(verify_lines(verification)), flush=True
    )
    verification.raise_if_damaged()


@store_app.command("gc")
def store_gc(
    store: StoreOption = DEFAULT_STORE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be removed, and remove nothing.")
    ] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also remove checkpoints from which interrupted runs would resume.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove artifacts that no run in the store refers to, and what interrupted processes have left."""
    from tunery.store import Store as TheStore
    from tunery.store_commands.garbage_collection import collect_garbage
    from tunery.store_commands.store_views import gc_lines

    result = collect_garbage(
        TheStore(store), dry_run=dry_run, unfinished=unfinished, notify=partial(print, file=sys.stderr, flush=True)
    )
    print(json.dumps(result.as_json(), indent=1) if as_json else "\n".join(gc_lines(result)))


def main() -> None:
    """Run a command. Exit codes: 0 success, 1 failure, 2 invalid request, 130 interrupted."""
    atexit.register(_ignore_signals)  # exit handlers run in reverse order of registration
    with STOP.handled(), STOP.held():
        code = run_command()
        _flush()
        if has_unfinished_calls():
            os._exit(code)
    if code:
        sys.exit(code)


def run_command() -> int:
    """Run the command of `sys.argv`, print its error if it fails, and return the exit code."""
    try:
        with STOP.released():
            # typer (0.29) converts KeyboardInterrupt to Exit(130), whose code is returned without standalone mode.
            code = app(standalone_mode=False)
    except TuneryError as error:
        _print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        code = Interrupted.exit_code
    except OSError as error:
        _print_error(_system_error(error))
        return 1
    except Exception as error:
        show = getattr(error, "show", None)  # click's own usage errors
        if show is None:
            raise
        show()
        return 2
    if code == Interrupted.exit_code:
        _print_error(Interrupted("stopped"))
    return code if isinstance(code, int) else 0


def _system_error(error: OSError) -> TuneryError:
    """Convert an operating system error (full disk, no permission, no connection) to a TuneryError."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return TuneryError(
        f"{' and '.join(names)}: {error.strerror}" if names and error.strerror else str(error) or type(error).__name__,
        remedy="free some space or use another --store" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "",
    )


def _print_error(error: TuneryError) -> None:
    try:
        print(error if isinstance(error, Interrupted) else f"error: {error}", file=sys.stderr, flush=True)
    except OSError:  # standard error is closed, or a file on a full disk: only the exit code can be reported
        _discard(sys.stderr)


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError:  # `tunery plan | head`: the reader has exited; or a file on a full disk
        _discard(sys.stdout)


def _discard(stream: TextIO) -> None:
    """Redirect a stream to /dev/null, so that Python does not fail to flush its buffer at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _ignore_signals() -> None:
    """Ignore signals at exit, so that they do not change the exit code."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
