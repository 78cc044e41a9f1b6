"""Metrics of generated texts against references: BLEU and chrF by sacrebleu, ROUGE by rouge-score.

All figures are on the scale 0 to 100, higher is better. They are those of the published tools with their defaults:
corpus BLEU (Papineni et al. 2002; Post 2018, arXiv:1804.08771), chrF2 (Popović 2015), and the mean over the rows of the
F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) with Porter stemming.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ds_llm.config.text_metrics import METRICS, ROUGE


def compare(texts: Sequence[str], references: Sequence[str], names: Sequence[str], tokenizer: str = "13a") -> dict:
    """Figures of `texts` against `references` (one each), by the names of `LABELS`.

    names: of `METRICS`. tokenizer: what BLEU and ROUGE count as words. 13a is sacrebleu's default for BLEU, and for
    ROUGE rouge-score's own, which knows the letters a-z and digits only; intl, zh (Chinese characters one by one) and
    char are sacrebleu's, for both, without stemming. chrF compares characters and needs none.
    """
    if len(texts) != len(references) or not texts:
        raise ValueError(f"{len(texts)} texts and {len(references)} references: one for each, and at least one")
    found = {}
    for name in METRICS:
        if name in names:
            found |= (
                _rouge(texts, references, tokenizer) if name == "rouge" else _corpus(name, texts, references, tokenizer)
            )
    return found


def signatures(names: Sequence[str], tokenizer: str = "13a") -> dict[str, str]:
    """The signature of each metric in the notation of its package, to state beside its figure."""
    from importlib.metadata import version

    found = {}
    for name in METRICS:
        if name == "rouge" and name in names:
            how = "words:a-z0-9|stemmer:porter" if tokenizer == "13a" else f"words:{tokenizer}|stemmer:none"
            found[name] = f"f1|mean|{how}|rouge-score:{version('rouge-score')}"
        elif name in names:
            metric = _sacrebleu(name, tokenizer)
            metric.corpus_score(["a"], [["a"]])  # the number of references is part of it and known from a use only
            found[name] = str(metric.get_signature())
    return found


def _sacrebleu(name: str, tokenizer: str):
    from sacrebleu.metrics import BLEU, CHRF

    # force: no warning about texts that look tokenised
    return CHRF() if name == "chrf" else BLEU(tokenize=tokenizer, force=True)


def _corpus(name: str, texts: Sequence[str], references: Sequence[str], tokenizer: str) -> dict[str, float]:
    return {name: float(_sacrebleu(name, tokenizer).corpus_score(list(texts), [list(references)]).score)}


class _Words:
    """A tokenizer of sacrebleu with the interface of rouge-score."""

    def __init__(self, name: str):
        self._split = _sacrebleu("bleu", name).tokenizer

    def tokenize(self, text: str) -> list[str]:
        return self._split(text.lower()).split()


def _rouge(texts: Sequence[str], references: Sequence[str], tokenizer: str) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    words = None if tokenizer == "13a" else _Words(tokenizer)
    scorer = RougeScorer(list(ROUGE), use_stemmer=words is None, tokenizer=words)
    rows = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {name: 100 * math.fsum(row[name].fmeasure for row in rows) / len(rows) for name in ROUGE}
