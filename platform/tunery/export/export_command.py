"""`tunery export`: writes a model with its card to a temporary folder, then renames it into place."""

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
from tunery.export.card import ExportFormat, card
from tunery.export.export_target import ExportTarget, select_model
from tunery.export.lineage import LineageStep, local_paths, manifests, strip_local_paths, trace
from tunery.export.weights import adapter_settings, write_adapter, write_model
from tunery.pipeline.ray_session import redirect_output
from tunery.pipeline.run_record import FILE_VALUES
from tunery.spec import TRAINERS, Pretrained
from tunery.spec.references import model_name
from tunery.store import Store
from tunery.store.atomic_write import publish_folder, temporary_name

CARD, LINEAGE = "README.md", "lineage.json"


@dataclass(frozen=True)
class Exported:
    """An exported model, its folder and its format."""

    target: ExportTarget
    out: Path
    format: ExportFormat

    def as_json(self) -> dict[str, Any]:
        target = self.target
        return {
            "run": target.state.run,
            "stage": target.stage,
            "kind": target.artifact.kind,
            "trial": target.trial.name if target.trial else None,
            "overrides": target.trial.overrides if target.trial else {},
            "fingerprint": target.artifact.fingerprint,
            "out": str(self.out),
            "format": "model" if self.format.base is None else "adapter",
            "base": self.format.base,
            "base_command": self.format.base_command or None,
            "notes": list(target.notes),
        }


def export_model(
    run: str, out: Path, store: Store, *, stage: str | None = None, trial: str | None = None, adapter: bool = False
) -> Exported:
    """Write the model of a run's stage to the folder `out`. Raises RequestError, before anything is written, if there
    is no such model or `out` is not usable, and TuneryError if reading or writing fails."""
    _check_output_folder(out)
    target = select_model(run, store, stage, trial)
    steps = trace(target.experiment.stages, target.stage, target.artifact)
    export_format = _export_format(target, out, adapter=adapter)
    # Discards what libraries print while they load; problems are raised as errors.
    with _temporary_folder(target, out) as folder, redirect_output(Path(os.devnull)):
        _write(target, steps, export_format, folder)
    return Exported(target, out, export_format)


def render(exported: Exported) -> str:
    """Summary of the export for the terminal."""
    target, base, base_command = exported.target, exported.format.base, exported.format.base_command
    model = f"{target.stage} of {target.state.run}" + (
        f", trained {target.trained_with}" if target.trained_with else ""
    )
    lines = [f"{exported.out}: {'the adapter of ' if base else ''}{model} ({target.artifact.path.name})"]
    if base:
        lines.append(f"base model: {base}" + (f", exported by: {base_command}" if base_command else ""))
    lines += [f"note: {note}" for note in target.notes]
    return "\n".join([*lines, f"usage, training and lineage: {exported.out / CARD}"])


def _export_format(target: ExportTarget, out: Path, *, adapter: bool) -> ExportFormat:
    name, kind = target.stage, target.artifact.kind
    stage, settings = target.experiment.stages[name], adapter_settings(target.artifact.path)
    if adapter and not settings:
        raise RequestError(
            f"`{name}` has no adapter",
            cause="all of its weights were trained, without `tuner: {lora: ..}`",
            remedy="remove --adapter",
        )
    num_labels = len(TRAINERS[kind].labels)
    merged = ExportFormat(out.resolve().name, num_labels, settings, None)
    if not adapter:
        return merged
    model = getattr(stage, "model", None)
    if isinstance(model, Pretrained):
        base = f"./{model_name(model)}" if model.is_folder else model.pretrained
        return replace(merged, base=base, revision=model.revision)
    trial = () if target.trial is None else ("--trial", target.trial.name)
    option = ("--trial", FILE_VALUES) if target.trial is None and target.is_searched else trial
    command = shlex.join(("tunery", "export", target.state.run, f"./{model}", "--stage", str(model), *option))
    return replace(merged, base=f"./{model}", base_command=command)


def _write(target: ExportTarget, steps: list[LineageStep], export_format: ExportFormat, folder: Path) -> None:
    artifact, classifier = target.artifact.path, export_format.num_labels > 0
    if export_format.base is None:
        write_model(artifact, folder, classifier=classifier)
    else:
        write_adapter(artifact, folder, export_format.base, export_format.revision, classifier=classifier)
    paths = local_paths(target.experiment)
    lineage = {
        "experiment": target.state.run,
        "stage": target.stage,
        "trial": target.trial.name if target.trial else None,
        "overrides": target.trial.overrides if target.trial else {},
        "versions": target.state.versions,
        "stages": manifests(steps),
    }
    (folder / LINEAGE).write_text(json.dumps(strip_local_paths(lineage, paths), indent=1, ensure_ascii=False) + "\n")
    (folder / CARD).write_text(strip_local_paths(card(target, steps, export_format), paths), encoding="utf-8")


def _check_output_folder(out: Path) -> None:
    """Raises RequestError unless the folder is empty or can be created."""
    remedy = "use a folder that does not exist or is empty"
    if out.is_dir() and out.resolve() == Path.cwd():
        raise RequestError(f"{out} is the current working directory", remedy=remedy)
    if out.is_dir() and any(out.iterdir()):
        raise RequestError(f"{out} isn't empty", cause="export never overwrites files", remedy=remedy)
    if not out.is_dir() and os.path.lexists(out):
        raise RequestError(f"{out} is a file", remedy=remedy)
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        cause = f"no permission to write in {parent}" if parent.is_dir() else f"{parent} is a file"
        raise RequestError(f"{out} can't be written", cause=cause, remedy="use another folder")


@contextmanager
def _temporary_folder(target: ExportTarget, out: Path) -> Iterator[Path]:
    """A folder next to `out` that is renamed to it on success, and removed on failure."""
    final = out.resolve()  # the target of a symlink, not the link
    folder = temporary_name(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield folder
        publish_folder(folder, final)
    except TuneryError:
        raise
    except Exception as error:  # transformers, PEFT and safetensors have no common exception type
        lines = str(error).strip().splitlines()
        raise TuneryError(
            f"`{target.stage}` can't be exported to {out}",
            cause=f"{type(error).__name__}: {lines[0] if lines else ''}",
            remedy="check free space and permissions there; if the artifact can't be read, remove "
            f"{target.artifact.path} and run `tunery run` again",
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
