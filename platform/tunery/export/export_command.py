"""`tunery export`: the model that is meant, written aside with its card, then renamed into place."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunery.errors import RequestError, TuneryError
from tunery.export.card import Form, card
from tunery.export.choose import ExportTarget, choose
from tunery.export.lineage import Link, local_paths, manifests, strip_local_paths, trace
from tunery.export.weights import adapter_settings, write_adapter, write_model
from tunery.models.labels import REWARD
from tunery.pipeline.ray_session import redirect_output
from tunery.pipeline.run_record import OWN
from tunery.spec import LABELS, Pretrained
from tunery.spec.references import model_name
from tunery.store import Store

CARD, LINEAGE = "README.md", "lineage.json"


@dataclass(frozen=True)
class Exported:
    """What was written where."""

    chosen: ExportTarget
    out: Path
    form: Form

    def as_json(self) -> dict[str, Any]:
        chosen, form = self.chosen, self.form
        return {
            "run": chosen.state.run,
            "stage": chosen.stage,
            "kind": chosen.artifact.kind,
            "trial": chosen.trial.name if chosen.trial else None,
            "overrides": chosen.trial.overrides if chosen.trial else {},
            "fingerprint": chosen.artifact.fingerprint,
            "out": str(self.out),
            "form": "model" if form.base is None else "adapter",
            "base": form.base,
            "base_command": form.base_command or None,
            "notes": list(chosen.notes),
        }


def export_model(
    run: str, out: Path, store: Store, *, stage: str | None = None, trial: str | None = None, adapter: bool = False
) -> Exported:
    """Write the model of a run's stage into the folder `out`. Raises RequestError, before anything is written, where
    there is no such model or no such place, and TuneryError where it can't be read or written."""
    _check_free(out)
    chosen = choose(run, store, stage, trial)
    links = trace(chosen.experiment.stages, chosen.stage, chosen.artifact)
    form = _form(chosen, out, adapter=adapter)
    # What libraries print while they load; what is wrong comes as an error.
    with _aside(chosen, out) as folder, redirect_output(Path(os.devnull)):
        _write(chosen, links, form, folder)
    return Exported(chosen, out, form)


def render(exported: Exported) -> str:
    """What was written, in words."""
    chosen, form = exported.chosen, exported.form
    made = f"{chosen.stage} of {chosen.state.run}" + (f", made {chosen.by}" if chosen.by else "")
    lines = [f"{exported.out}: {'the adapter of ' if form.base else ''}{made} ({chosen.artifact.path.name})"]
    if form.base_command:
        lines.append(f"it lies on {form.base}: {form.base_command}")
    elif form.base:
        lines.append(f"it lies on {form.base}")
    lines += [f"note: {note}" for note in chosen.notes]
    return "\n".join([*lines, f"how to load it, and how it came about: {exported.out / CARD}"])


def _form(chosen: ExportTarget, out: Path, *, adapter: bool) -> Form:
    name, kind = chosen.stage, chosen.artifact.kind
    stage, settings = chosen.experiment.stages[name], adapter_settings(chosen.artifact.path)
    if adapter and not settings:
        raise RequestError(
            f"`{name}` has no adapter",
            cause="it was trained whole, without `tuner: {lora: ..}`",
            remedy="leave out --adapter",
        )
    labels = {"reward": len(REWARD), "classifier": len(LABELS)}.get(kind, 0)
    whole = Form(out.resolve().name, labels, settings, None)
    if not adapter:
        return whole
    model = getattr(stage, "model", None)
    if isinstance(model, Pretrained):
        base = f"./{model_name(model)}" if model.is_folder else model.pretrained
        return replace(whole, base=base, revision=model.revision)
    trial = () if chosen.trial is None else ("--trial", chosen.trial.name)
    own = ("--trial", OWN) if chosen.trial is None and chosen.is_searched else trial
    command = shlex.join(("tunery", "export", chosen.state.run, f"./{model}", "--stage", str(model), *own))
    return replace(whole, base=f"./{model}", base_command=command)


def _write(chosen: ExportTarget, links: list[Link], form: Form, folder: Path) -> None:
    artifact, classifier = chosen.artifact.path, form.labels > 0
    if form.base is None:
        write_model(artifact, folder, classifier=classifier)
    else:
        write_adapter(artifact, folder, form.base, form.revision, classifier=classifier)
    known = local_paths(chosen.experiment)
    told = {
        "experiment": chosen.state.run,
        "stage": chosen.stage,
        "trial": chosen.trial.name if chosen.trial else None,
        "overrides": chosen.trial.overrides if chosen.trial else {},
        "versions": chosen.state.versions,
        "stages": manifests(links),
    }
    (folder / LINEAGE).write_text(json.dumps(strip_local_paths(told, known), indent=1, ensure_ascii=False) + "\n")
    (folder / CARD).write_text(strip_local_paths(card(chosen, links, form), known), encoding="utf-8")


def _check_free(out: Path) -> None:
    """Raises RequestError where the folder can't be ours."""
    remedy = "give a folder that isn't there yet, or an empty one"
    if out.is_dir() and out.resolve() == Path.cwd():
        raise RequestError(f"{out} is the folder that the command is given in", remedy=remedy)
    if out.is_dir() and any(out.iterdir()):
        raise RequestError(f"{out} isn't empty", cause="nothing is ever written over", remedy=remedy)
    if not out.is_dir() and os.path.lexists(out):
        raise RequestError(f"{out} is a file", remedy=remedy)
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = f"no permission to write in {above}" if above.is_dir() else f"{above} is a file"
        raise RequestError(f"{out} can't be written", cause=why, remedy="give another place")


@contextmanager
def _aside(chosen: ExportTarget, out: Path) -> Iterator[Path]:
    """A place beside `out` that becomes it at the end, or isn't there any more."""
    final = out.resolve()  # what stands at a link is meant, not the link
    folder = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield folder
        folder.replace(final)
    except TuneryError:
        raise
    except Exception as error:  # transformers, PEFT and safetensors raise of everything
        told = str(error).strip().splitlines()
        raise TuneryError(
            f"`{chosen.stage}` can't be exported to {out}",
            cause=f"{type(error).__name__}: {told[0] if told else ''}",
            remedy="look at the room and the permissions there; if it can't be read, remove "
            f"{chosen.artifact.path} and give `tunery run` again",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
