"""The whole table of proofs for a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import transformers

from ds_llm.errors import UserError, first_line
from ds_llm.verify import chats, processes
from ds_llm.verify.checks import checks
from ds_llm.verify.report import REFUSED, Row, prove
from ds_llm.verify.subject import Subject


def rows(subject: Subject) -> Iterator[Row]:
    """The rows of the table, each as soon as it is found."""
    found = checks(subject)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them wait for each other at every operation of so small a model
    try:
        _ = subject.small
        with processes.Job(subject) as job:
            yield from (prove(name, check) for name, check in found.items())
            yield from job.rows()
    except UserError as error:  # there is no small model
        yield from (Row(name, REFUSED, first_line(error)) for name in (*found, *processes.CASES))
    finally:
        torch.set_num_threads(threads)
    yield prove(chats.NAME, lambda: chats.check(subject))


def as_json(subject: Subject, found: list[Row]) -> dict:
    """The table as JSON, with the model, its attention kernel and the version of transformers."""
    return {
        "model": subject.name,
        "model_type": subject.config.model_type,
        "attention": subject.attention,
        "transformers": transformers.__version__,
        "rows": [row.to_dict() for row in found],
    }
