"""What of a row is asked and answered, and whether it can be worded anew or serve as an example."""

from __future__ import annotations

from dataclasses import dataclass

from tunery.augment.heldout_rows import group_number
from tunery.store.rows import Row


@dataclass(frozen=True)
class QAPair:
    """One question and its answer, that may stand before another question."""

    id: str
    group: int
    """A hash (heldout.py); 0 where the row has none."""
    system: str
    """What the system's turn says, "" where there is none: an answer is one under it."""
    question: str
    answer: str
    final: str | None
    """The final answer behind the separator; None where the answer holds no reasoning, or none is looked for."""


def qa_pair_of(row: Row, separator: str | None) -> QAPair | str:
    """The row as an example, or why it is none."""
    turns = row.get("messages") or []
    if not turns or turns[-1]["role"] != "assistant":
        return "no answer"
    if (reason := multi_turn_reason(row)) is not None:
        return reason
    if row.get("label") is False:
        return "rated as bad"
    answer = turns[-1]["content"]
    if not (turns[-2]["content"].strip() and answer.strip()):
        return "nothing said"
    final = final_answer(answer, separator) if separator is not None else None
    return QAPair(row["id"], group_number(row.get("group")), system_of(row), turns[-2]["content"], answer, final)


def last_user_index(row: Row) -> int | None:
    """Index of the last turn of the user; None where there is none that says something."""
    turns = row.get("messages") or []
    found = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    return found[-1] if found and turns[found[-1]]["content"].strip() else None


def multi_turn_reason(row: Row) -> str | None:
    """Why the row is more than a question, and an answer where there is one, after what the system says; None where it
    is not. Examples of single exchanges before a running conversation would look like a part of it, and an answer
    without a tool like a reason not to call one."""
    turns = row["messages"]
    if row.get("tools") is not None or any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns):
        return "tools"
    roles = [turn["role"] for turn in turns if turn["role"] != "system"]
    leading = [turn["role"] for turn in turns[: len(turns) - len(roles)]]
    return None if roles in (["user"], ["user", "assistant"]) and set(leading) <= {"system"} else "several turns"


def system_of(row: Row) -> str:
    return "\n\n".join(turn["content"] for turn in row["messages"] if turn["role"] == "system")


def final_answer(answer: str, separator: str) -> str | None:
    """What stands behind the last separator, where something stands before it too."""
    reasoning, found, final = answer.rpartition(separator)
    return final.strip() if found and reasoning.strip() and final.strip() else None
