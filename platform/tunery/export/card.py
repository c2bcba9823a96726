"""The model card of an exported model: README.md with the metadata that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from tunery.export.card_tables import (
    fields,
    loss_row,
    search_line,
    space_rows,
    stage_line,
    training_results,
    version_rows,
    win_row,
)
from tunery.export.export_target import ExportTarget
from tunery.export.lineage import LineageStep, losses, pretrained_root, wins
from tunery.reporting.report_sections import opening_comment
from tunery.spec import LABELS, TRAINERS, adapter_spec, tuner_of
from tunery.spec.plugins import load_object
from tunery.spec.tuners import FULL

TEMPLATE = "card.md.jinja"


@dataclass(frozen=True)
class ExportFormat:
    """How the model is exported: all of it, or an adapter of a base model."""

    folder: str
    """Name of the output folder."""
    num_labels: int
    """Outputs of a classifier or reward model; 0 for a language model."""
    peft_config: dict[str, Any]
    """PEFT's configuration of the training; empty if all weights were trained."""
    base: str | None
    """The adapter's base model, a hub name or a folder; None for a complete model."""
    revision: str | None = None
    """Revision of a base from the hub."""
    base_command: str = ""
    """Command that exports the base model; empty if it is not a stage of the experiment."""


def card(target: ExportTarget, steps: list[LineageStep], export_format: ExportFormat) -> str:
    """Render the model card as Markdown."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = _cell
    template = environment.from_string(resources.files("tunery.export").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    step, state = steps[-1], target.state
    loss_results = losses(step.artifact)
    forgetting = any("forgetting" in result for result in loss_results)
    return template.render(
        metadata=yaml.safe_dump(card_metadata(steps, export_format), sort_keys=False, allow_unicode=True),
        title=f"{state.run}: {target.stage}",
        description=_description(target, export_format),
        question=opening_comment(state.text.lstrip()),
        usage=_usage_code(export_format),
        remarks=list(_remarks(step, export_format)),
        fields=fields(step, export_format.peft_config),
        results=training_results(step),
        steps=[stage_line(item) for item in steps],
        losses=[loss_row(result, forgetting=forgetting) for result in loss_results],
        forgetting=forgetting,
        wins=[win_row(result) for result in wins(step.artifact)],
        search=search_line(target),
        space=space_rows(target),
        versions=version_rows(target, step),
    )


def _cell(text: str) -> str:
    """Escape a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def card_metadata(steps: list[LineageStep], export_format: ExportFormat) -> dict[str, Any]:
    """The card's YAML metadata (https://huggingface.co/docs/hub/model-cards)."""
    root, adapter = pretrained_root(steps), export_format.base is not None
    from_hub = root is not None and not root.is_folder
    tuner = adapter_spec(tuner_of(steps[-1].stage)).kind
    return {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if export_format.num_labels else "text-generation",
        **({"base_model": root.pretrained} if root is not None and from_hub else {}),
        **({"base_model_relation": "adapter" if adapter else "finetune"} if from_hub else {}),
        "tags": ["tunery", steps[-1].stage.kind, *([tuner] if tuner != FULL else [])],
    }


def _description(target: ExportTarget, export_format: ExportFormat) -> str:
    kind = target.experiment.stages[target.stage].kind
    model = TRAINERS[kind].model_name
    article = "The adapter (PEFT) of a" if export_format.base else "A"
    trained = f" It was trained {target.trained_with}." if target.trained_with else ""
    experiment = target.state.run
    return f"{article} {model}, from the stage `{target.stage}` ({kind}) of the experiment `{experiment}`.{trained}"


def _usage_code(export_format: ExportFormat) -> str:
    auto_class = "AutoModelForSequenceClassification" if export_format.num_labels else "AutoModelForCausalLM"
    folder = f'"./{export_format.folder}"'
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({folder})"
    imports = f"from transformers import {auto_class}, AutoTokenizer"
    if export_format.base is None:
        return f"{imports}\n\n{tokenizer}\nmodel = {auto_class}.from_pretrained({folder})"
    options = f', revision="{export_format.revision}"' if export_format.revision else ""
    if export_format.num_labels:
        options += f", num_labels={export_format.num_labels}, pad_token_id=tokenizer.pad_token_id"
    lines = [
        f'base = {auto_class}.from_pretrained("{export_format.base}"{options})',
        f"model = PeftModel.from_pretrained(base, {folder})",
    ]
    return "\n".join(["from peft import PeftModel", imports, "", tokenizer, *lines])


def _remarks(step: LineageStep, export_format: ExportFormat) -> Iterator[str]:
    facts, base = step.artifact.facts, export_format.base
    if export_format.base_command:
        yield f"The base is another model of the experiment. To export it: `{export_format.base_command}`."
    elif base is not None and base.startswith("./"):
        yield f"The base is the external model folder `{base}`."
    if remarks := TRAINERS[step.stage.kind].card_remarks:
        yield from load_object(remarks)(facts)
    if export_format.num_labels:
        yield (
            "It was trained on text rendered with the tokenizer's chat template; without a template, on prompt and "
            "response as a pair of texts."
        )


def classifier_remarks(facts: Mapping[str, Any]) -> Iterator[str]:
    """What a user of a classifier needs to know about its outputs."""
    names = ", ".join(f"{number} is `{name}`" for number, name in enumerate(LABELS))
    temperature = facts.get("temperature")
    scaling = f" divided by {temperature:.4g}, the temperature fitted to held-out rows" if temperature else ""
    yield f"Labels: {names}. Probabilities are the softmax of the logits{scaling}."


def reward_remarks(facts: Mapping[str, Any]) -> Iterator[str]:
    """What a user of a reward model needs to know about its output."""
    mean, std = facts["reward_mean"], facts["reward_std"]
    yield (
        "Its single output is the reward of a conversation up to its last response. tunery normalizes it with mean "
        f"and standard deviation: (output - {mean:.6g}) / {std:.6g}."
    )
