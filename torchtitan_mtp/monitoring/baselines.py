"""How low a head's loss could be if it saw nothing but one token: the bar an MTP head must pass.

The skip-bigram entropy H(t[i+k] | t[i]) of a text, from the text's own pair counts, is the least
cross-entropy that any predictor can reach on that text from t[i] alone: the counts are fitted to
the very text that they are measured on, so no trained table of bigrams does better. A head k whose
held-out loss is below it has used more of the context than the current token.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def skip_bigram_entropies(
    tokens: ArrayLike, labels: ArrayLike, vocab_size: int, ignore_index: int = -100
) -> list[float]:
    """[H(t[i]), H(t[i+1] | t[i]), ..., H(t[i+n] | t[i])] in nats, over the pairs that a loss is of.

    tokens: [N], padding left out. labels: [N, n], the token k ahead, or `ignore_index` where there
    is none; a distance without any pair has entropy nan. Only pairs that occur are held.
    """
    text, targets = np.asarray(tokens, dtype=np.int64), np.asarray(labels)
    entropies = [_entropy(text)]
    for target in targets.T:
        valid = target != ignore_index
        x, y = text[valid], target[valid]
        entropies.append(_entropy(x * vocab_size + y) - _entropy(x))  # H(Y|X) = H(X, Y) - H(X)
    return entropies


def _entropy(symbols: np.ndarray) -> float:
    """Entropy in nats of the symbols' frequencies."""
    if symbols.size == 0:
        return float("nan")
    counts = np.unique(symbols, return_counts=True)[1]
    p = counts / symbols.size
    return float(-(p * np.log(p)).sum())


def comparison_table(
    losses: Sequence[float], accuracies: Sequence[float], entropies: Sequence[float]
) -> str:
    """Plain text: each head's held-out loss beside the text's entropy given one token."""
    header = f"{'head':>4}  {'predicts':>8}  {'held-out loss':>13}  {'H(t[i+k]|t[i])':>14}  "
    lines = [header + f"{'below':>5}  {'accuracy':>8}"]
    rows = zip(losses, entropies[1:], accuracies, strict=True)
    for k, (loss, entropy, accuracy) in enumerate(rows, 1):
        if np.isnan(accuracy):
            continue  # no target
        below = "yes" if loss < entropy else "no"
        lines.append(
            f"{k:>4}  {f't[i+{k}]':>8}  {loss:>13.4f}  {entropy:>14.4f}  {below:>5}  "
            f"{accuracy:>8.1%}"
        )
    lines.append(f"in nats a token; entropy of single tokens H(t): {entropies[0]:.4f}")
    return "\n".join(lines)
