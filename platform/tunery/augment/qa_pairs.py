"""Extraction of question and answer from a row, and the checks whether it can be augmented or used as an example."""

from __future__ import annotations

from dataclasses import dataclass

from tunery.augment.heldout_rows import group_hash
from tunery.store.rows import Row


@dataclass(frozen=True)
class QAPair:
    """One question and its answer, usable as a few-shot example."""

    id: str
    group: int
    """Hash of the group (heldout_rows.py); 0 for no group."""
    system: str
    """Content of the system message, or ""; the answer depends on it."""
    question: str
    answer: str
    final: str | None
    """The final answer after the separator; None if the answer contains no reasoning, or no separator is given."""


def qa_pair_of(row: Row, separator: str | None) -> QAPair | str:
    """Return the row as an example, or the reason why it can't be one."""
    messages = row.get("messages") or []
    if not messages or messages[-1]["role"] != "assistant":
        return "no answer"
    if (reason := multi_turn_reason(row)) is not None:
        return reason
    if row.get("label") is False:
        return "rated as bad"
    answer = messages[-1]["content"]
    if not (messages[-2]["content"].strip() and answer.strip()):
        return "nothing said"
    final = final_answer(answer, separator) if separator is not None else None
    return QAPair(row["id"], group_hash(row.get("group")), system_of(row), messages[-2]["content"], answer, final)


def last_user_index(row: Row) -> int | None:
    """Return the index of the last user message, or None if there is none or it is blank."""
    messages = row.get("messages") or []
    user_indices = [index for index, message in enumerate(messages) if message["role"] == "user"]
    return user_indices[-1] if user_indices and messages[user_indices[-1]]["content"].strip() else None


def multi_turn_reason(row: Row) -> str | None:
    """Return why the row is not a single question with at most one answer after leading system messages, or None.

    Single-turn examples before a longer conversation would look like a part of it, and examples without tool calls
    would teach the model not to call tools.
    """
    messages = row["messages"]
    if row.get("tools") is not None or any(
        message["role"] == "tool" or message.get("tool_calls") for message in messages
    ):
        return "tools"
    roles = [message["role"] for message in messages if message["role"] != "system"]
    leading = [message["role"] for message in messages[: len(messages) - len(roles)]]
    return None if roles in (["user"], ["user", "assistant"]) and set(leading) <= {"system"} else "several turns"


def system_of(row: Row) -> str:
    return "\n\n".join(message["content"] for message in row["messages"] if message["role"] == "system")


def final_answer(answer: str, separator: str) -> str | None:
    """Return the text after the last separator, or None if the text before or after it is blank."""
    reasoning, matched, final = answer.rpartition(separator)
    return final.strip() if matched and reasoning.strip() and final.strip() else None
