"""Names of the metrics of generated texts, and a check that their packages are installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from ds_llm.errors import UserError

METRICS = {"bleu": "sacrebleu", "chrf": "sacrebleu", "rouge": "rouge_score"}  # and the package that computes each
TOKENIZERS = ("13a", "intl", "zh", "char")
ROUGE = ("rouge1", "rouge2", "rougeL")
LABELS = {"bleu": "BLEU", "chrf": "chrF", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def check_metrics(names: Sequence[str], tokenizer: str, where: str) -> None:
    """Raise `UserError` that begins with `where` for an unknown metric or tokenizer or a package that is missing."""
    for name in names:
        if name not in METRICS:
            raise UserError(f"{where}: '{name}' is not one of {', '.join(METRICS)}")
        if find_spec(METRICS[name]) is None or (name == "rouge" and tokenizer != "13a" and not find_spec("sacrebleu")):
            raise UserError(
                f"{where}: {name} needs a package that is not installed; run: pip install 'ds_llm[metrics]'"
            )
    if tokenizer not in TOKENIZERS:
        raise UserError(f"{where}: tokenizer '{tokenizer}' is not one of {', '.join(TOKENIZERS)}")
