"""How near a free answer comes to true and to false references: BLEU and ROUGE, as lm-evaluation-harness has them.

Papineni et al., ACL 2002 (sacrebleu: international tokenisation, exponential smoothing); Lin, ACL Workshop 2004
(rouge-score: F1 of ROUGE-1, ROUGE-2 and ROUGE-Lsum, without stemming). Both packages come with the extra `harness`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module, util
from typing import Any

ROUGE = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rougeLsum"}  # the harness' name -> rouge-score's


def check() -> None:
    """Raise ValueError when the packages are missing: before a study runs, not after."""
    missing = [package for package in ("sacrebleu", "rouge_score") if util.find_spec(package) is None]
    if missing:
        raise ValueError(
            f"truthful_qa: form = 'generation' needs {' and '.join(missing)}: pip install \"raysys[harness]\", "
            "or choose form = 'mc1' or 'mc2'."
        )


def scores(text: str, true: Sequence[str], false: Sequence[str]) -> dict[str, float]:
    """By metric, for bleu, rouge1, rouge2 and rougeL: `_max`, the best over the true references, in [0, 1]; `_diff`,
    that less the best over the false ones, in [-1, 1]; `_acc`, 1 where it is positive. The harness' own max and diff
    are a hundred times these."""
    check()
    right, wrong = ({name: max(values) for name, values in _all(text, refs).items()} for refs in (true, false))
    found: dict[str, float] = {}
    for name in right:
        found |= {
            f"{name}_max": min(right[name], 1.0),  # BLEU of a text with itself is above 1 in the last bit
            f"{name}_acc": float(right[name] > wrong[name]),
            f"{name}_diff": right[name] - wrong[name],
        }
    return found


def _all(text: str, references: Sequence[str]) -> dict[str, list[float]]:
    rouge: Any = import_module("rouge_score.rouge_scorer").RougeScorer(list(ROUGE.values()))
    rows = [rouge.score(_lines(reference), _lines(text)) for reference in references]
    found = {name: [float(row[key].fmeasure) for row in rows] for name, key in ROUGE.items()}
    return {"bleu": [_bleu(text, reference) for reference in references], **found}


def _bleu(text: str, reference: str) -> float:
    bleu: Any = import_module("sacrebleu").corpus_bleu
    return float(bleu([text], [[reference]], smooth_method="exp", smooth_value=0.0, tokenize="intl").score) / 100


def _lines(text: str) -> str:
    """One sentence a line, where ROUGE-Lsum looks for them."""
    return text.replace(" . ", ".\n")
