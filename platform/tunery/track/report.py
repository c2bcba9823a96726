"""The report of a run: one HTML file that needs nothing else, neither a network nor a server.

Drawn from the event log alone, so it can be written for a run that is under way, interrupted or failed.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tunery.track import augmented, curves, filters, previews, responses, reviews, sections, sweep, timing
from tunery.track.events import read_events
from tunery.track.leaderboard import verdict
from tunery.track.notes import note, outcome
from tunery.track.sheets import fact
from tunery.track.snapshot import RunState, StageState
from tunery.track.state import replay
from tunery.track.wording import duration

TEMPLATE = "report.html.jinja"


def write_report(run_folder: Path) -> Path:
    """Write `<run_folder>/report.html` from the folder's event log and return its path."""
    path = run_folder / "report.html"
    page = report_html(replay(read_events(run_folder / "events")), name=run_folder.name)
    # Aside and renamed into place: a browser that reloads while a run goes on never sees half a page.
    aside = path.with_name(f".report.{os.getpid()}.html")
    aside.write_text(page, encoding="utf-8")
    aside.replace(path)
    return path


def report_html(state: RunState, name: str = "") -> str:
    """The page for a run's state; `name` is used where the log doesn't say one."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # Charts escape their own text (axes.py); everything else passes through the template's escaping.
    environment.filters["drawn"] = Markup
    template = environment.from_string(resources.files("tunery.track").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    search = state.search
    page = template.render(
        run=state.run or name,
        state=state,
        question=sections.question(state.text),
        begun=_moment(state.started),
        took=_took(state),
        versions=sections.versions(state),
        problems=_problems(state),
        comparisons=sections.comparisons(state),
        leaderboard=sections.leaderboard(state),
        funnels=sections.funnels(state),
        scores=sections.score_figures(state),
        aucs=filters.auc_tables(state),
        heats=filters.heat_figures(state),
        filters=filters.filters(state),
        quarantines=filters.quarantines(state),
        reviews=reviews.reviews(state),
        augmented=augmented.augmented(state),
        previews=previews.previews(_told_stages(state)),
        open_previews=previews.OPEN,
        curves=curves.curve_figures(state),
        details=curves.curve_details(state),
        responses=responses.responses(_told_stages(state)),
        open_responses=responses.OPEN,
        search=search,
        search_summary=sweep.summary(search) if search else "",
        search_verdict=verdict(search) if search else [],
        parallel=sweep.parallel(search) if search else None,
        pareto=sweep.pareto(search) if search else None,
        importance=sweep.importance(search) if search else [],
        scatters=sweep.scatters(search) if search else [],
        trial_curves=sweep.trial_curves(search) if search else None,
        trials=sweep.trials_table(search) if search else None,
        overhead=timing.overhead(state),
        timeline=timing.timeline(state),
        stages=[(stage, _said(stage), fact(_facts(stage)), _seconds(stage)) for stage in _told_stages(state)],
    )
    return page.lstrip()  # the macros before the page leave blank lines


def _told_stages(state: RunState) -> list[StageState]:
    """The run's stages, and those of the best trial: what came out of the search can be looked up as well."""
    best = state.search.best if state.search else None
    return [*state.stages.values(), *(best.stages.values() if best else ())]


def _facts(stage: StageState) -> dict[str, object]:
    own = {"fingerprint": stage.fingerprint, "artifact": stage.artifact, "detail": stage.detail}
    return {**{name: value for name, value in own.items() if value}, **stage.facts}


def _said(stage: StageState) -> str:
    return outcome(stage) if stage.status in ("done", "reused") else note(stage)


def _problems(state: RunState) -> list[tuple[str, list[tuple[str, str]]]]:
    """What stands on top of the page of a run that did not end well: (headline, [(label, text)])."""
    told = [
        (
            f"{failure.stage}: {failure.message}",
            [
                (label, said)
                for label, said in (
                    ("cause", failure.cause),
                    ("remedy", failure.remedy),
                    ("log", failure.log),
                )
                if said
            ],
        )
        for failure in state.failures
    ]
    if not told and state.status in ("failed", "interrupted"):
        rest = "The same command goes on where this run stopped." if state.status == "interrupted" else ""
        return [(state.message or f"the run was {state.status}", [("remedy", rest)] if rest else [])]
    return told


def _moment(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC") if seconds is not None else ""


def _took(state: RunState) -> str:
    elapsed = state.elapsed(state.last_event or 0.0)
    return duration(elapsed) if elapsed is not None else ""


def _seconds(stage: StageState) -> str:
    elapsed = stage.elapsed(stage.finished or stage.started or 0.0) if stage.finished else stage.seconds
    return duration(elapsed) if elapsed is not None else ""
