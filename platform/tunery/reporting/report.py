"""The HTML report of a run: one self-contained file that needs no network and no server.

It is rendered from the event log alone, so it can also be written for a running, interrupted or failed run. It
omits sections that are empty.
"""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tunery.events.event_log import read_events
from tunery.events.event_reducer import replay
from tunery.events.formatting import duration
from tunery.events.leaderboard import winner_summary
from tunery.events.run_state import RunState, StageState
from tunery.events.stage_summary import note, outcome
from tunery.reporting import (
    augment_section,
    curves,
    filter_section,
    funnel_section,
    preview_section,
    report_sections,
    responses,
    review_section,
    score_section,
    search_report,
    timing_section,
)
from tunery.reporting.tables import fact
from tunery.store.atomic_write import write_text

TEMPLATE = "report.html.jinja"


def write_report(run_folder: Path) -> Path:
    """Write `<run_folder>/report.html` from the folder's event log and return its path."""
    path = run_folder / "report.html"
    page = report_html(replay(read_events(run_folder / "events")), name=run_folder.name)
    # Atomic: a browser that reloads during a run never reads a partial page.
    write_text(path, page)
    return path


def report_html(state: RunState, name: str = "") -> str:
    """Render the page for a run's state; `name` is used if the log has no run name."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    # Charts escape their own text (axes.py); the template escapes everything else.
    environment.filters["svg"] = Markup
    template = environment.from_string(
        resources.files("tunery.reporting").joinpath(TEMPLATE).read_text(encoding="utf-8")
    )
    search = state.search
    page = template.render(
        run=state.run or name,
        state=state,
        comment=report_sections.opening_comment(state.text),
        started=_timestamp(state.started),
        elapsed=_elapsed(state),
        versions=report_sections.versions(state),
        problems=_problems(state),
        comparisons=report_sections.comparisons(state),
        leaderboard=report_sections.leaderboard(state),
        funnels=funnel_section.funnels(state),
        scores=score_section.score_figures(state),
        aucs=score_section.auc_tables(state),
        heatmaps=score_section.heatmap_figures(state),
        filters=filter_section.filters(state),
        quarantines=filter_section.quarantines(state),
        reviews=review_section.reviews(state),
        augmented=augment_section.augmented(state),
        previews=preview_section.previews(_stages(state)),
        open_previews=preview_section.MAX_EXPANDED,
        curves=curves.curve_figures(state),
        details=curves.curve_details(state),
        responses=responses.responses(_stages(state)),
        open_responses=responses.MAX_EXPANDED,
        search=search,
        search_summary=search_report.summary(search) if search else "",
        winner_summary=winner_summary(search) if search else [],
        parallel=search_report.parallel(search) if search else None,
        pareto=search_report.pareto(search) if search else None,
        importance=search_report.importance(search) if search else [],
        scatters=search_report.scatters(search) if search else [],
        trial_curves=search_report.trial_curves(search) if search else None,
        trials=search_report.trials_table(search) if search else None,
        overhead=timing_section.overhead(state),
        timeline=timing_section.timeline(state),
        stages=[(stage, _summary(stage), fact(_facts(stage)), _duration(stage)) for stage in _stages(state)],
    )
    return page.lstrip()  # the macros before the page leave blank lines


def _stages(state: RunState) -> list[StageState]:
    """The run's stages, followed by those of the best trial."""
    best = state.search.best if state.search else None
    return [*state.stages.values(), *(best.stages.values() if best else ())]


def _facts(stage: StageState) -> dict[str, object]:
    own = {"fingerprint": stage.fingerprint, "artifact": stage.artifact, "detail": stage.detail}
    return {**{name: value for name, value in own.items() if value}, **stage.facts}


def _summary(stage: StageState) -> str:
    return outcome(stage) if stage.status in ("done", "reused") else note(stage)


def _problems(state: RunState) -> list[tuple[str, list[tuple[str, str]]]]:
    """Failures, or the interruption, at the top of the page: (headline, [(label, text)])."""
    problems = [
        (
            f"{failure.stage}: {failure.message}",
            [
                (label, text)
                for label, text in (
                    ("cause", failure.cause),
                    ("remedy", failure.remedy),
                    ("log", failure.log),
                )
                if text
            ],
        )
        for failure in state.failures
    ]
    if not problems and state.status in ("failed", "interrupted"):
        remedy = "Run the same command again to resume." if state.status == "interrupted" else ""
        return [(state.message or f"the run was {state.status}", [("remedy", remedy)] if remedy else [])]
    return problems


def _timestamp(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC") if seconds is not None else ""


def _elapsed(state: RunState) -> str:
    elapsed = state.elapsed(state.last_event or 0.0)
    return duration(elapsed) if elapsed is not None else ""


def _duration(stage: StageState) -> str:
    elapsed = stage.elapsed(stage.finished or stage.started or 0.0) if stage.finished else stage.seconds
    return duration(elapsed) if elapsed is not None else ""
