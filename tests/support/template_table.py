"""Write docs/templates.md: the features of each chat template, determined by encoding conversations.

PYTHONPATH=platform:tests/support python tests/support/template_table.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conversation_kinds import KINDS, TOOLS, encoded_kinds, row_of
from template_tokenizers import FAMILIES, source_of, tokenizer_of

from tunery.models.chat_template import chat_template_of
from tunery.models.encode import Encoding, as_prompt, encode_prompts, encode_untruncated

PATH = Path(__file__).parents[2] / "docs" / "templates.md"
COLUMNS = [
    "template",
    "system turn",
    "tool calls",
    "calls at once",
    "tool results",
    "definitions of tools",
    "reasoning",
    "earlier reasoning",
    "generation prompt",
    "a response ends with",
    "notes",
]
TITLES = {
    "chatml": "ChatML *",
    "dated": "one that writes the date *",
    "drops_thinking": "one that drops earlier reasoning *",
    "glm_plain": "like GLM-4, without end token *",
    "ignores_system": "one that ignores the system turn *",
    "llama2": "like Llama 2 *",
    "mistral_v3": "like Mistral v0.3 *",
    "no_end_tokens": "roles as text, no end tokens *",
    "plain": "tunery's, for a tokenizer without one",
    "raises_on_system": "one that refuses system turns *",
    "scratch": "tunery's, for new models",
    "strips_content": "one that strips content *",
    "vicuna": "like Vicuna *",
    "zephyr": "like Zephyr *",
}


def cells(family: str) -> list[str]:
    tokenizer, items = tokenizer_of(family), encoded_kinds(family)
    profile = chat_template_of(tokenizer).profile

    def is_supported(kind: str) -> str:
        return "no" if items[kind].rejected else "yes"

    def texts(kind: str) -> list[str]:
        return [str(tokenizer.decode(items[kind].ids[start:end])) for start, end in items[kind].spans]

    (result,) = encode_untruncated(
        [row_of("tool call last") | {"messages": KINDS["tool call"]}], tokenizer, Encoding(10**6)
    )
    (definitions,) = encode_untruncated([{"messages": KINDS["single"], "tools": TOOLS}], tokenizer, Encoding(10**6))
    reasoning = "trained" if any("because" in text for text in texts("reasoning")) else "left out"
    several = texts("reasoning in several turns")
    if any("first" in text for text in several):
        earlier = "kept"
    else:
        earlier = "turn masked" if len(several) == 1 else "left out"
    return [
        is_supported("system turn"),
        is_supported("tool call last"),
        is_supported("parallel tool calls") if is_supported("tool call") == "yes" else _parallel_calls(items),
        "no" if result.rejected else "yes",
        "no" if definitions.rejected else "yes",
        reasoning,
        earlier,
        _prompt(family),
        " ".join(
            f"`{token}`" for token in (_end_token(texts("single")[0], profile.end_tokens), *_tool_call_ends(family))
        ),
        "; ".join(_notes(family, texts)),
    ]


def _parallel_calls(items: dict[str, Any]) -> str:
    """Return "yes" if a template without tool definitions supports several calls in one message, else "no"."""
    return "no" if items["tool call last"].rejected else "yes"


def _end_token(text: str, ends: tuple[str, ...]) -> str:
    return next(token for token in ends if text.endswith(token))


def _tool_call_ends(family: str) -> list[str]:
    """Return the end token of messages with tool calls if it differs from that of other messages."""
    tokenizer = tokenizer_of(family)
    item = encoded_kinds(family)["tool call last"]
    plain = encoded_kinds(family)["single"]
    if item.rejected or item.ids[item.response[1] - 1] == plain.ids[plain.response[1] - 1]:
        return []
    return [str(tokenizer.decode([item.ids[item.response[1] - 1]]))]


def _prompt(family: str) -> str:
    """Describe how the generation prompt relates to the masked prefix of a response without reasoning."""
    tokenizer, item = tokenizer_of(family), encoded_kinds(family)["single"]
    (prompt,) = encode_prompts([as_prompt(row_of("single"))], tokenizer)
    masked = item.ids[: item.response[0]]
    if masked == prompt.ids:
        return "is what is masked"
    if masked[: len(prompt.ids)] == prompt.ids:
        return "an empty thinking block follows"
    return "opens a thinking block"


def _reopens_turn(family: str) -> bool:
    row, item = row_of("empty tool result"), encoded_kinds(family)["empty tool result"]
    (prompt,) = encode_prompts([as_prompt(row)], tokenizer_of(family))
    masked = item.ids[: item.response[0]]
    return bool(item.ids) and _prompt(family) == "is what is masked" and masked != prompt.ids


def _notes(family: str, texts: Any) -> list[str]:
    items, source = encoded_kinds(family), source_of(family)
    notes = []
    if chat_template_of(tokenizer_of(family)).profile.generation_blocks:
        notes.append("has generation blocks")
    if items["two user turns"].rejected:
        notes.append("user and assistant turns must alternate")
    if not items["tool call last"].rejected and items["text beside a tool call"].rejected:
        notes.append("no text beside a tool call")
    if "\n Paris" not in texts("outer white space")[0]:
        notes.append("strips responses")
    if chat_template_of(tokenizer_of(family)).profile.appended_end:
        notes.append("the end token is added behind the last response")
    if chat_template_of(tokenizer_of(family)).profile.history_ends:
        notes.append("earlier responses end with another token, which is not trained")
    elif texts("several turns")[0].endswith("It is one."):
        notes.append("earlier responses have no end token that could be trained")
    called = "".join(texts("reasoning before a tool call"))
    if "because" in called and "because" not in texts("reasoning")[0]:
        notes.append("reasoning is rendered before tool calls only")
    if _reopens_turn(family):
        notes.append("a response to a tool result begins a turn, which the generation prompt does not")
    if "strftime_now" in source:
        notes.append("writes today's date: other tokens every day")
    return notes


def table() -> str:
    rows, training, same = [], [], []
    for family in FAMILIES:
        original = family.removesuffix("_training")
        row = cells(family)
        if original == family:
            rows.append([TITLES.get(family, family), *row])
        elif cells(original)[:-1] == row[:-1]:
            same.append(family)
        else:
            training.append([family, *row])
    rows.sort(key=lambda row: ("*" in row[0] or "tunery" in row[0], row[0]))
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows + training]
    lines += ["", f"The other {len(same)} `*_training` templates of TRL work as their originals do."]
    return "\n".join(lines)


def page() -> str:
    text = PATH.read_text(encoding="utf-8")
    before, _, rest = text.partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- end of table -->\n")
    return f"{before}<!-- table -->\n{table()}\n<!-- end of table -->\n{after}"


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
