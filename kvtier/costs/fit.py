"""Fitting a cost to what was measured: non-negative least squares of relative errors, with guessed ratios."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

_GUESS_WEIGHT = 0.005  # of a guessed ratio beside a measurement: it decides only what no measurement tells
_LEAST = 1e-15  # of a guessed coefficient, which is divided by


def fitted(
    features: Sequence[Sequence[float]], seconds: Sequence[float], guess: Sequence[float], main: int
) -> tuple[float, ...]:
    """Return non-negative ``coefficients`` so that ``features @ coefficients`` is close to ``seconds``.

    Errors count relative to the measured seconds, so that short and long ones weigh the same. Of the guess only the
    ratios of the coefficients take part, with little weight: one measurement moves all of them, and measurements of
    different kinds tell them apart.

    Args:
        features: of each measurement, ``[measurements][coefficients]``.
        seconds: of each measurement. Those that are not positive are ignored.
        guess: the coefficients that hold when nothing was measured.
        main: index of the coefficient to which the others have ratios.
    """
    measured = np.asarray(seconds, float)
    known = measured > 0
    if not known.any():
        return tuple(map(float, guess))
    measured, rows = measured[known], np.asarray(features, float)[known]
    guessed = np.maximum(np.asarray(guess, float), _LEAST)
    scale = float(measured.sum() / (rows @ guessed).sum())
    ratios = np.diag(1 / guessed)
    ratios[:, main] -= 1 / guessed[main]
    a = np.vstack([rows / measured[:, None], ratios * (_GUESS_WEIGHT / scale)])
    b = np.concatenate([np.ones(len(measured)), np.zeros(len(guessed))])
    return tuple(map(float, _non_negative(a, b)))


def _non_negative(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the ``x >= 0`` with the least squares of ``a @ x - b``, by trying sets of positive coefficients.

    The first set whose solution no other coefficient would improve is the right one (Karush, Kuhn and Tucker); where
    rounding hides it, the best set is taken.
    """
    scales: npt.NDArray[np.float64] = np.maximum(np.abs(a).max(axis=0), 1e-300)  # they differ by twelve orders
    scaled = a / scales
    products, targets = scaled.T @ scaled, scaled.T @ b
    best: npt.NDArray[np.float64] = np.zeros(len(scales))
    least, rounding = 0.0, 1e-12 * float(np.abs(targets).max())
    for count in range(len(scales), 0, -1):
        for some in map(list, combinations(range(len(scales)), count)):
            found = np.linalg.lstsq(products[np.ix_(some, some)], targets[some], rcond=None)[0]
            if (found < 0).any():
                continue
            tried: npt.NDArray[np.float64] = np.zeros(len(scales))
            tried[some] = found
            slopes = products @ tried - targets
            error = float(tried @ (slopes - targets))
            if error < least:
                best, least = tried, error
            if (slopes >= -rounding).all():
                return np.divide(tried, scales)
    return np.divide(best, scales)
