"""Multiple-choice questions as rows, and the task file with which lm-eval asks them.

The prompts are those of lm-eval's own tasks of these data sets, which fetch them from a hub. What is here is a part or
another split of some (see `ds_llm.data.corpora`), so the tasks are named `local_...`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

LETTERS = "ABCDE"


def _lettered(count: int) -> dict:
    """The choices stand in the prompt and their letters are answers."""
    listed = "\n".join(f"{letter}. {{{{choices[{i}]}}}}" for i, letter in enumerate(LETTERS[:count]))
    return {"doc_to_text": f"{{{{question}}}}\n{listed}\nAnswer:", "doc_to_choice": list(LETTERS[:count])}


def _metrics(*names: str) -> dict:
    listed = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]
    return {"metric_list": listed}


TASKS = {
    "mmlu": {
        "description": "The following are multiple choice questions (with answers).\n\n",
        **_lettered(4),
        **_metrics("acc"),
    },
    "commonsense_qa": {
        **_lettered(5),
        "doc_to_text": "Question: " + _lettered(5)["doc_to_text"],
        **_metrics("acc"),
    },
    "piqa": {
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        **_metrics("acc", "acc_norm"),
    },
    "openbookqa": {"doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", **_metrics("acc", "acc_norm")},
    "boolq": {
        "doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:",
        "doc_to_choice": "{{choices}}",
        **_metrics("acc"),
    },
}


def task_file(name: str, rows: Path) -> str:
    """The text of lm-eval's task file for the questions `name` of `TASKS` in a JSONL file, named by its whole path."""
    task = {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows.resolve())}},
        "test_split": "test",
        "fewshot_split": "test",  # named, lm-eval takes the question itself out of its examples
        "output_type": "multiple_choice",
        **TASKS[name],
        "doc_to_target": "answer",
        "metadata": {"version": 1.0},
    }
    return yaml.safe_dump(task, sort_keys=False, allow_unicode=True, width=1000)


def questions(rows: Iterable[dict]) -> Iterator[dict]:
    """`{"question", "choices", "answer"}`, the answer as the number of its choice from 0, of rows whose options are
    lines behind letters ("A. ...") and whose answer is one of these lines. Rows without an answer, or with one that is
    not among the options, are left out."""
    for row in rows:
        parts = re.split(r"(?:^|\n)([A-E])\. ?", row["options"].strip("\n"))
        letters, choices = parts[1::2], [choice.strip() for choice in parts[2::2]]
        found = re.match(r"([A-E])\. ?(.*)", row.get("answer", "").strip(), re.DOTALL)
        if not found or "".join(letters) != LETTERS[: len(letters)] or found[1] not in letters:
            continue
        answer = letters.index(found[1])
        if choices[answer] == found[2].strip():
            yield {"question": row["question"].strip(), "choices": choices, "answer": answer}
