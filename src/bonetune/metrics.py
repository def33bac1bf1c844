"""How well a classifier's outputs agree with the labels."""

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor


def agreement(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews' correlation for classes; Pearson's and Spearman's correlation for numbers.

    F1 is the mean over the classes that occur among the labels or the answers; a correlation with something constant is 0.

    Args:
        logits: (examples, classes), or (examples, 1) for regression; floating.
        labels: (examples,): classes, int64, or numbers, float32.
    """
    if logits.shape[-1] == 1:
        return _correlations(logits[:, 0].double().numpy(), labels.double().numpy())
    table = np.zeros((logits.shape[-1],) * 2)
    np.add.at(table, (labels.numpy(), logits.argmax(-1).numpy()), 1)
    right, wanted, given = np.diag(table), table.sum(1), table.sum(0)
    occurring = wanted + given > 0
    total = table.sum()
    spread = np.sqrt((total**2 - (wanted**2).sum()) * (total**2 - (given**2).sum()))
    matthews = (right.sum() * total - (wanted * given).sum()) / spread if spread else 0.0
    return {
        "accuracy": float(right.sum() / total),
        "f1": float(f1(right, given, wanted)[occurring].mean()),
        "matthews": float(matthews),
    }


def f1(right: ArrayLike, given: ArrayLike, wanted: ArrayLike) -> np.ndarray:
    """2 right / (given + wanted), the harmonic mean of precision and recall; 0 of a class that is neither given nor wanted.

    Args:
        right, given, wanted: how often a class is answered rightly, is answered, and should be; of one shape.
    """
    occurring = np.add(given, wanted, dtype=float)
    return np.divide(np.multiply(2.0, right), occurring, out=np.zeros_like(occurring), where=occurring > 0)


def _correlations(given: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    def pearson(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else 0.0

    return {"pearson": pearson(given, wanted), "spearman": pearson(_ranks(given), _ranks(wanted))}


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, the mean of them for equal values."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]
