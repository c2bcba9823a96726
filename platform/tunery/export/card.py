"""The card of an exported model: README.md with the front matter that the Hugging Face hub reads. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from tunery.export.card_tables import fields, loss_row, outcomes, search_line, space_rows, step, version_rows, win_row
from tunery.export.choose import ExportTarget
from tunery.export.lineage import Link, losses, root_of, wins
from tunery.reporting.report_sections import question
from tunery.spec import LABELS

TEMPLATE = "card.md.jinja"


@dataclass(frozen=True)
class Form:
    """What stands beside the card."""

    folder: str
    """Its name."""
    labels: int
    """Of a classifier; 0 of a language model."""
    settings: dict[str, Any]
    """PEFT's, of what was trained; empty where all of the model was."""
    base: str | None
    """What the adapter lies on, a hub name or a folder; None of a whole model."""
    revision: str | None = None
    """Of a base from the hub."""
    base_command: str = ""
    """The command line that writes the base's folder; empty where no stage made it."""


def card(chosen: ExportTarget, links: list[Link], form: Form) -> str:
    """Markdown."""
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = _cell
    template = environment.from_string(resources.files("tunery.export").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    link, state = links[-1], chosen.state
    measured = losses(link.artifact)
    forgetting = any("forgetting" in result for result in measured)
    return template.render(
        front=yaml.safe_dump(front_matter(links, form), sort_keys=False, allow_unicode=True),
        title=f"{state.run}: {chosen.stage}",
        what=_what(chosen, form),
        question=question(state.text.lstrip()).splitlines(),
        use=_use(form),
        remarks=list(_remarks(link, form)),
        fields=fields(link, form.settings),
        outcome=outcomes(link),
        steps=[step(item) for item in links],
        losses=[loss_row(result, forgetting=forgetting) for result in measured],
        forgetting=forgetting,
        wins=[win_row(result) for result in wins(link.artifact)],
        search=search_line(chosen),
        space=space_rows(chosen),
        versions=version_rows(chosen, link),
    )


def _cell(text: str) -> str:
    """In a row of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def front_matter(links: list[Link], form: Form) -> dict[str, Any]:
    """https://huggingface.co/docs/hub/model-cards"""
    root, adapter = root_of(links), form.base is not None
    from_hub = root is not None and not root.is_folder
    lora = ["lora"] if form.settings else []
    return {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-classification" if form.labels else "text-generation",
        **({"base_model": root.pretrained} if root is not None and from_hub else {}),
        **({"base_model_relation": "adapter" if adapter else "finetune"} if from_hub else {}),
        "tags": ["tunery", links[-1].stage.kind, *lora],
    }


def _what(chosen: ExportTarget, form: Form) -> str:
    kind = chosen.experiment.stages[chosen.stage].kind
    what = "reward model" if kind == "reward" else "text classifier" if form.labels else "causal language model"
    form_of = "The adapter (PEFT) of a" if form.base else "A"
    by = f" It was made {chosen.by}." if chosen.by else ""
    return f"{form_of} {what}, from the stage `{chosen.stage}` ({kind}) of the experiment `{chosen.state.run}`.{by}"


def _use(form: Form) -> str:
    auto = "AutoModelForSequenceClassification" if form.labels else "AutoModelForCausalLM"
    here = f'"./{form.folder}"'
    tokenizer = f"tokenizer = AutoTokenizer.from_pretrained({here})"
    imports = f"from transformers import {auto}, AutoTokenizer"
    if form.base is None:
        return f"{imports}\n\n{tokenizer}\nmodel = {auto}.from_pretrained({here})"
    options = f', revision="{form.revision}"' if form.revision else ""
    if form.labels:
        options += f", num_labels={form.labels}, pad_token_id=tokenizer.pad_token_id"
    lines = [
        f'base = {auto}.from_pretrained("{form.base}"{options})',
        f"model = PeftModel.from_pretrained(base, {here})",
    ]
    return "\n".join(["from peft import PeftModel", imports, "", tokenizer, *lines])


def _remarks(link: Link, form: Form) -> Iterator[str]:
    facts = link.artifact.facts
    if form.base_command:
        yield f"The base is another model of the experiment: `{form.base_command}` writes it."
    elif form.base is not None and form.base.startswith("./"):
        yield f"The base is the model folder `{form.base}`, which the experiment took from outside."
    if link.stage.kind == "classifier":
        names = ", ".join(f"{number} is `{name}`" for number, name in enumerate(LABELS))
        fitted = facts.get("temperature")
        by = f"; divided by {fitted:.4g} first (the temperature), they fit held-out rows best" if fitted else ""
        yield f"Labels: {names}. Probabilities are the softmax of the logits{by}."
    if link.stage.kind == "reward":
        mean, deviation = facts["reward_mean"], facts["reward_deviation"]
        yield (
            "Its one output is a reward for a conversation up to its last answer. tunery's rewards are "
            f"(output - {mean:.6g}) / {deviation:.6g}: in deviations from the mean."
        )
    if form.labels:
        yield "It has seen rows as the tokenizer's chat template has them; without one, question and answer as a pair."
