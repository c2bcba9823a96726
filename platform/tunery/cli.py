"""The commands. No logic here: each calls one function and prints what it returns."""

from __future__ import annotations

import atexit
import errno
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from tunery.errors import Interrupted, TuneryError
from tunery.interrupt import STOP, STOP_SIGNALS, left_behind
from tunery.store import DEFAULT_STORE

if TYPE_CHECKING:
    from tunery.spec import Experiment
    from tunery.spec.yaml_source import YamlSource
    from tunery.store import Store

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Fine-tuning experiments on Ray."
)
File = Annotated[Path, typer.Argument(help="The experiment, a .yaml file.", show_default=False)]
StoreOption = Annotated[
    Path, typer.Option("--store", envvar="TUNERY_STORE", help="Where artifacts, runs and reports are kept.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]


def _checked(file: Path, store: Path) -> tuple[Experiment, YamlSource, Store]:
    from tunery.run import check_all
    from tunery.spec import load
    from tunery.store import Store as TheStore

    experiment, source = load(file)
    the_store = TheStore(store)
    return check_all(experiment, source, the_store), source, the_store


@app.command()
def validate(file: File, store: StoreOption = DEFAULT_STORE, as_json: Json = False) -> None:
    """Check an experiment: its text, its files and models, its search space. Starts and writes nothing."""
    from tunery.pipeline.validate import notes
    from tunery.pipeline.validate_templates import template_notes

    experiment, source, _ = _checked(file, store)
    found = notes(experiment, source)
    found += [f"`{stage}`: {note}" for stage, note in template_notes(experiment, file.parent).items()]
    if as_json:
        summary = {"file": str(file), "name": experiment.name, "stages": len(experiment.stages), "notes": found}
        print(json.dumps(summary))
    else:
        searched = f", {experiment.search.trials} trials" if experiment.search else ""
        print(f"{file}: ok ({experiment.name}: {len(experiment.stages)} stages{searched})")
        for note in found:
            print(f"note: {note}")


@app.command()
def plan(file: File, store: StoreOption = DEFAULT_STORE, as_json: Json = False) -> None:
    """Show what a run would do: stages, what is reused and why the rest is not, rows, steps, memory, time."""
    from rich.console import Console

    from tunery.pipeline.plan import render_plan
    from tunery.run import plan_experiment

    experiment, source, the_store = _checked(file, store)
    planned = plan_experiment(experiment, source, the_store)
    if as_json:
        print(json.dumps(planned.as_json(), indent=1))
    else:
        Console(highlight=False).print(render_plan(planned))


@app.command()
def run(file: File, store: StoreOption = DEFAULT_STORE, as_json: Json = False) -> None:
    """Run an experiment. Finished stages are reused; rerun the command to resume an interrupted run."""
    experiment, source, the_store = _checked(file, store)
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
            help="File for the rows that pass, with the columns they have in the source. Format by its ending: .csv, "
            ".tsv, .jsonl, .json, .xlsx, .parquet.",
            show_default=False,
        ),
    ],
    by: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCORE",
            help="A score: length=words, gopher, language=en, perplexity=./model. May be repeated.",
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE",
            help='A rule on a score: "length 3..500", "language >= 0.1", "perplexity best 80%", "random best 1000". '
            "May be repeated.",
            show_default=False,
        ),
    ] = None,
    any_rule: Annotated[bool, typer.Option("--any", help="Keep rows that pass any rule, instead of all.")] = False,
    dropped: Annotated[
        Path | None,
        typer.Option(
            help="File for all other rows, also those that can't be read, each with `dropped_by` and `dropped_reason`.",
            show_default=False,
        ),
    ] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Append a column for each score to both files.")] = False,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=NAME",
            help="What a column is to the scores, where its name doesn't tell: prompt=Frage. Roles: text, prompt, "
            "input, completion, messages, chosen, rejected, label, system, tools. May be repeated.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Read at most so many rows.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the score `random`.")] = 17,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Score the rows of files and write those that pass, unchanged, to a file of the same or another format.

    The experiment that does it is written beside that file.
    """
    from rich.console import Console

    from tunery.filter.filter_command import render, run_filter
    from tunery.filter.filter_experiment import FilterRequest
    from tunery.store import Store as TheStore

    words = (tuple(sources), out, tuple(by or ()), tuple(keep or ()))
    asked = FilterRequest(*words, any_rule, tuple(column or ()), limit, seed, scores)
    say = (lambda note: None) if as_json else partial(print, flush=True)
    outcome = run_filter(asked, dropped, TheStore(store), quiet=as_json, say=say)
    if as_json:
        print(json.dumps(outcome.as_json(), indent=1))
    else:
        Console(highlight=False).print(render(outcome))


@app.command()
def review(
    file: File,
    stage: Annotated[str, typer.Argument(help="The review stage whose rows to look at.", show_default=False)],
    store: StoreOption = DEFAULT_STORE,
    xlsx: Annotated[
        Path | None, typer.Option(help="Write them to this workbook instead of showing a page.", show_default=False)
    ] = None,
    port: Annotated[int, typer.Option(help="Of the page on 127.0.0.1; 0 takes a free one.")] = 0,
    browser: Annotated[bool, typer.Option(help="Open the page.")] = True,
    show_filter: Annotated[
        bool, typer.Option("--show-filter", help="Show score and verdict before the decision; they lead the eye.")
    ] = False,
) -> None:
    """Look at rows near a filter's cut and decide: keep or drop. On a page of this machine, or in a workbook."""
    experiment, source, the_store = _checked(file, store)
    from tunery.pipeline.review_command import find_review, serve_review, write_review

    pending = find_review(experiment, source, the_store, stage)
    if xlsx is not None:
        write_review(pending, xlsx, show_filter=show_filter, say=print)
    else:
        serve_review(pending, port=port, show_filter=show_filter, browser=browser, say=partial(print, flush=True))


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="A run's name or folder.", show_default=False)],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Rebuild the report of a run: one HTML file that needs nothing else."""
    from tunery.reporting.report import write_report
    from tunery.store import Store as TheStore

    print(write_report(TheStore(store).find_run(run)))


@app.command()
def preview(
    file: File,
    stage: Annotated[str, typer.Argument(help="A stage that feeds rows to a model.", show_default=False)],
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 3,
    offset: Annotated[int, typer.Option(min=0, help="Skip so many rows.")] = 0,
    row: Annotated[
        str | None, typer.Option(metavar="ID", help="This row alone; the id may be shortened.", show_default=False)
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="Print each token as id:text.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Show rows as a model gets them: tokens, which of them are trained, what is cut off. Starts and writes nothing."""
    from rich.console import Console

    from tunery.preview.preview_command import preview as preview_stage
    from tunery.preview.preview_terminal import render
    from tunery.store import Store as TheStore

    shown = preview_stage(file, stage, TheStore(store), rows, offset, row)
    if as_json:
        print(json.dumps(shown.as_json()))
        return
    console = Console(highlight=False)
    colours = console.is_terminal and not console.is_dumb_terminal and not console.no_color
    # A program that reads it gets the text's own lines, whatever its width.
    console.print(render(shown, colours=colours, ids=ids), soft_wrap=not colours)


@app.command()
def trials(
    run: Annotated[str, typer.Argument(help="A run's name or folder.", show_default=False)],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TRIAL|PATH=VALUE",
            help="After --stop trials; after --add and --clone values, as sft.learning_rate=1e-3.",
            show_default=False,
        ),
    ] = None,
    stop: Annotated[bool, typer.Option("--stop", help="End these trials before their time.")] = False,
    add: Annotated[bool, typer.Option("--add", help="Add a trial: the file's values, and these.")] = False,
    clone: Annotated[
        str | None, typer.Option(metavar="TRIAL", help="Add a trial: this one's values, and these.", show_default=False)
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """List the trials of a search; stop some and add others while it runs, from another terminal."""
    from rich.console import Console

    from tunery.search.trial_commands import trials as steer
    from tunery.store import Store as TheStore

    outcome = steer(run, TheStore(store), words or (), stop=stop, add=add, clone=clone)
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
    right: Annotated[str, typer.Argument(help="Another one.", show_default=False, metavar="RUN")],
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Set two runs or trials side by side: what was measured, which fields differ, which rows only one trained on."""
    from rich.console import Console

    from tunery.compare.compare_command import compare as set_side_by_side
    from tunery.compare.compare_command import render
    from tunery.store import Store as TheStore

    comparison = set_side_by_side(left, right, TheStore(store))
    if as_json:
        print(json.dumps(comparison.as_json(), indent=1))
    else:
        Console(highlight=False).print(render(comparison))


@app.command()
def export(
    run: Annotated[
        str, typer.Argument(metavar="FILE_OR_RUN", help="A run's experiment, name or folder.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write: a new one, or an empty one.", show_default=False)],
    stage: Annotated[
        str | None,
        typer.Option(help="The stage whose model to write; else the one that the search, or the file, ends with."),
    ] = None,
    trial: Annotated[
        str | None, typer.Option(help="The trial that made it; else the best one. `file`: the file's own values.")
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="The adapter alone, not merged into its base.")] = False,
    store: StoreOption = DEFAULT_STORE,
    as_json: Json = False,
) -> None:
    """Write a run's model as a plain Hugging Face folder, with a card that says how it came about."""
    from tunery.export.export_command import export_model, render
    from tunery.store import Store as TheStore

    exported = export_model(run, out, TheStore(store), stage=stage, trial=trial, adapter=adapter)
    print(json.dumps(exported.as_json(), indent=1) if as_json else render(exported))


def main() -> None:
    """Exit codes: 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted."""
    atexit.register(_ignore_signals)  # the first one to be registered is the last one to be called
    with STOP.handled(), STOP.held():
        code = _run_command()
        _flush()
        if left_behind():
            os._exit(code)
    if code:
        sys.exit(code)


def _run_command() -> int:
    try:
        with STOP.released():
            # typer (0.29) makes an Exit(130) of KeyboardInterrupt, and without its standalone mode returns that code.
            code = app(standalone_mode=False)
    except TuneryError as error:
        _say(error)
        return error.exit_code
    except KeyboardInterrupt:
        code = Interrupted.exit_code
    except OSError as error:
        _say(_system_error(error))
        return 1
    except Exception as error:
        show = getattr(error, "show", None)  # click's own usage errors
        if show is None:
            raise
        show()
        return 2
    if code == Interrupted.exit_code:
        _say(Interrupted("stopped"))
    return code if isinstance(code, int) else 0


def _system_error(error: OSError) -> TuneryError:
    """Of the system (a full disk, no permission, no connection) while something was written or read for a command."""
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return TuneryError(
        f"{' and '.join(names)}: {error.strerror}" if names and error.strerror else str(error) or type(error).__name__,
        remedy="free some space or give another --store" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "",
    )


def _say(error: TuneryError) -> None:
    try:
        print(error if isinstance(error, Interrupted) else f"error: {error}", file=sys.stderr, flush=True)
    except OSError:  # standard error is closed, or a file on a full disk: the exit code is all that can be reported
        _discard(sys.stderr)


def _flush() -> None:
    try:
        sys.stdout.flush()
    except OSError:  # `tunery plan | head`: the reader went away; or a file on a full disk
        _discard(sys.stdout)


def _discard(stream: TextIO) -> None:
    """Else Python complains, at its end, that it can't write what is left in the stream's buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _ignore_signals() -> None:
    """The exit code is settled by now."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
