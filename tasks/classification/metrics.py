"""What follows from predictions: accuracy, calibration, confusion, how sure a number is. Pure functions on arrays.

N images, K classes. Accuracies are percent; `correct` is (N,) bool, one entry per image. Intervals are for 95 %.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.sparse import csr_array
from scipy.stats import binom, binomtest

ECE_BINS = 15
TEMPERATURE_RANGE = (0.01, 100.0)
RESAMPLES = 10_000
_TAILS = (0.025, 0.975)
_ROWS_AT_ONCE = 2048  # bounds the memory of softmaxes at other temperatures


# ------------------------------------------------------------------------------------------------------------- accuracy
def accuracy(correct: np.ndarray) -> float:
    """Share of correct images, percent; NaN of none."""
    return 100 * np.count_nonzero(correct) / len(correct) if len(correct) else float("nan")


def accuracy_interval(correct: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap percentile interval of the accuracy, percent.

    The mean of N draws, with replacement, from zeros and ones is binomial: its quantiles are those of infinitely many
    resamples, without a seed. As for every bootstrap, the interval of 0 % and of 100 % has no width.
    """
    n = len(correct)
    if n == 0:
        return float("nan"), float("nan")
    low, high = binom.ppf(_TAILS, n, np.count_nonzero(correct) / n)
    return 100 * float(low) / n, 100 * float(high) / n


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> csr_array:
    """(K, K) counts, sparse: row is the label, column the prediction. `.toarray()` makes it dense."""
    ones = np.ones(len(labels), dtype=np.int64)
    matrix = csr_array((ones, (labels, predicted)), shape=(num_classes, num_classes))
    matrix.sum_duplicates()
    return matrix


@dataclass(frozen=True)
class ClassResults:
    """Per class, (K,) each; NaN, or -1 for `confused_with`, where a class has no such images."""

    images: np.ndarray  # with this label
    acc1: np.ndarray  # percent of them, the class's recall
    acc5: np.ndarray  # percent of them
    nll: np.ndarray  # mean over them
    predicted: np.ndarray  # images that are predicted as this class
    precision: np.ndarray  # percent of those that have this label
    confused_with: np.ndarray  # the other class that these images are most often taken for
    confused: np.ndarray  # how many of them


def class_results(labels: np.ndarray, top: np.ndarray, nll: np.ndarray, num_classes: int) -> ClassResults:
    """Results of every class.

    Args:
        labels: (N,) class indices.
        top: (N, k) class indices, the most probable first.
        nll: (N,) nats.
        num_classes: K.
    """

    def per_class(values: np.ndarray) -> np.ndarray:
        return np.bincount(labels, weights=values, minlength=num_classes)

    images = np.bincount(labels, minlength=num_classes)
    predicted = np.bincount(top[:, 0], minlength=num_classes)
    hits = per_class(top[:, 0] == labels)
    with np.errstate(invalid="ignore", divide="ignore"):
        acc1 = 100 * hits / images
        acc5 = 100 * per_class((top == labels[:, None]).any(axis=1)) / images
        mean_nll = per_class(nll) / images
        precision = 100 * hits / predicted
    wrong = top[:, 0] != labels
    mistakes = confusion_matrix(labels[wrong], top[wrong, 0], num_classes)
    confused = np.zeros(num_classes, dtype=np.int64)
    confused_with = np.full(num_classes, -1, dtype=np.int64)
    for row in np.flatnonzero(np.diff(mistakes.indptr)):
        span = slice(mistakes.indptr[row], mistakes.indptr[row + 1])
        best = np.argmax(mistakes.data[span])
        confused_with[row], confused[row] = mistakes.indices[span][best], mistakes.data[span][best]
    return ClassResults(images, acc1, acc5, mean_nll, predicted, precision, confused_with, confused)


# ---------------------------------------------------------------------------------------------------------- calibration
@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy in bins of equal width, for a reliability diagram."""

    edges: np.ndarray  # (bins + 1,) from 0 to 1; bin i holds confidences in (edges[i], edges[i + 1]]
    counts: np.ndarray  # (bins,) images
    confidence: np.ndarray  # (bins,) mean; NaN where a bin is empty
    accuracy: np.ndarray  # (bins,) share that is correct; NaN where a bin is empty
    ece: float  # expected calibration error: mean |confidence - accuracy| over the images, 0 to 1


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = ECE_BINS) -> Calibration:
    """Expected calibration error (Guo et al. 2017, eq. 3) of top-1 predictions, and the bins that it is made of.

    Args:
        confidence: (N,) probability of the predicted class.
        correct: (N,) bool.
        bins: their number; the error depends on it, and 15 is what papers report.
    """
    edges = np.linspace(0, 1, bins + 1)
    confidence = confidence.astype(np.float64)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    confidence_sum = np.bincount(index, weights=confidence, minlength=bins)
    correct_sum = np.bincount(index, weights=correct, minlength=bins)
    with np.errstate(invalid="ignore"):
        ece = float(np.abs(confidence_sum - correct_sum).sum() / counts.sum()) if len(confidence) else float("nan")
        return Calibration(edges, counts, confidence_sum / counts, correct_sum / counts, ece)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature T for which softmax(logits / T) has the smallest NLL on these very images.

    It is a diagnosis (above 1: over-confident, below 1: under-confident), not a result: a temperature to use must be
    fitted on other images. NLL is convex in 1/T, so its slope is followed to zero; where it has none within
    TEMPERATURE_RANGE, as for predictions that are all correct, the nearer end is returned.

    Args:
        logits: (N, K) float32.
        labels: (N,) class indices.
    """
    scores, targets = torch.from_numpy(logits), torch.from_numpy(labels)

    def slope(log_inverse: float) -> float:
        """d NLL / d(1/T): mean score under the softmax, less the label's."""
        total = 0.0
        for rows, wanted in zip(scores.split(_ROWS_AT_ONCE), targets.split(_ROWS_AT_ONCE)):
            shares = (rows * float(np.exp(log_inverse))).softmax(dim=1)
            label_scores = rows.gather(1, wanted[:, None])
            total += (shares * (rows - label_scores)).sum(dtype=torch.float64).item()
        return total / len(scores)

    low, high = (-np.log(temperature) for temperature in reversed(TEMPERATURE_RANGE))
    if slope(low) >= 0:
        return TEMPERATURE_RANGE[1]
    if slope(high) <= 0:
        return TEMPERATURE_RANGE[0]
    return float(np.exp(-brentq(slope, low, high, xtol=1e-5)))


def at_temperature(logits: np.ndarray, labels: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """NLL of the label and probability of the predicted class, (N,) each, of softmax(logits / temperature)."""
    nll, confidence = [], []
    pairs = zip(torch.from_numpy(logits).split(_ROWS_AT_ONCE), torch.from_numpy(labels).split(_ROWS_AT_ONCE))
    for rows, wanted in pairs:
        log_probabilities = (rows.double() / temperature).log_softmax(dim=1)
        nll.append(-log_probabilities.gather(1, wanted[:, None])[:, 0])
        confidence.append(log_probabilities.amax(dim=1).exp())
    return torch.cat(nll).numpy(), torch.cat(confidence).numpy()


# -------------------------------------------------------------------------------------------------- two against another
@dataclass(frozen=True)
class Comparison:
    """Two networks on the same images."""

    images: int
    accuracies: tuple[float, float]  # percent
    only_first: int  # images that only the first has right
    only_second: int  # images that only the second has right
    difference: float  # second minus first, percentage points
    interval: tuple[float, float]  # 95 % paired bootstrap percentile interval of the difference
    p_value: float  # exact McNemar test, two-sided: how likely as uneven a split is where both are equally good


def compare(first: np.ndarray, second: np.ndarray, seed: int = 0) -> Comparison:
    """Compare two (N,) bool arrays that say, image by image, who was right.

    A paired resample is a draw from three kinds of images: only the first right, only the second, no difference.
    """
    n = len(first)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    shares = np.array([only_first, only_second, n - only_first - only_second]) / n
    draws = np.random.default_rng(seed).multinomial(n, shares, size=RESAMPLES)
    low, high = np.quantile(100 * (draws[:, 1] - draws[:, 0]) / n, _TAILS)
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    accuracies = (accuracy(first), accuracy(second))
    difference = 100 * (only_second - only_first) / n
    return Comparison(n, accuracies, only_first, only_second, difference, (float(low), float(high)), p_value)
