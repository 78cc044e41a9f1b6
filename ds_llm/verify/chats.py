"""Which tokens of a conversation are trained, with the model's own tokenizer and chat template."""

from __future__ import annotations

import numpy as np

from ds_llm.data import chat
from ds_llm.data.conversations import RowError
from ds_llm.data.tokens import IGNORE
from ds_llm.errors import UserError
from ds_llm.pretrained.loading import load_tokenizer
from ds_llm.verify.report import Finding
from ds_llm.verify.subject import Subject

NAME = "chat: only answers are trained"
TURNS = (
    ("user", "Which planet is the largest?"),
    ("assistant", "Jupiter is the largest planet."),
    ("user", "And the smallest one?"),
    ("assistant", "Mercury, by far."),
)


def check(subject: Subject) -> Finding:
    """Render a conversation of two questions and answers, and compare what is trained with what the assistant says."""
    if subject.tokenizer is None:
        raise UserError("the configuration names no tokenizer; set data.tokenizer to check its chats")
    tokenizer = load_tokenizer(subject.tokenizer)
    chat.check_template(tokenizer)
    messages = [{"role": role, "content": text} for role, text in TURNS]
    try:
        encoded = chat.encode(tokenizer, messages, train_on=subject.train_on)
    except RowError as error:
        raise UserError(f"conversations with this template are dropped: {error}") from None
    ids, trained = np.array(encoded.input_ids), np.array(encoded.trained)
    labels = np.append(np.where(trained, ids, IGNORE)[1:], IGNORE)
    problem = _problem(tokenizer, messages, ids, trained, subject.train_on)
    about = problem or f"{trained.sum()} of {len(ids)} tokens are trained"
    return Finding(about, float(problem is not None), 0.0, ("a sample conversation", ids, labels, tokenizer))


def _problem(tokenizer, messages: list[dict], ids: np.ndarray, trained: np.ndarray, train_on: str) -> str | None:
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    if whole != ids.tolist():
        return "the tokens are not those of the tokenizer's own rendering"
    cuts = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(trained)) + 1)
    pieces = {True: [], False: []}
    for part in cuts:
        pieces[bool(trained[part[0]])].append(tokenizer.decode(ids[part], clean_up_tokenization_spaces=False))
    answers = [text for role, text in TURNS if role == "assistant"]
    answers = answers if train_on == "all" else answers[-1:]
    if len(pieces[True]) != len(answers):
        return f"{len(pieces[True])} parts are trained for {len(answers)} answers"
    for answer, piece in zip(answers, pieces[True], strict=True):
        if answer not in piece:
            return f"the answer {answer!r} is not trained whole: {piece!r}"
    asked = [text for role, text in TURNS if role == "user"]
    for text in asked:
        if not any(text in piece for piece in pieces[False]):
            return f"the question {text!r} is trained in part"
    return None
