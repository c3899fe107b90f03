"""Ranking metrics, exact and in float64; numpy only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: P(score of a positive > score of a negative) + ½ P(equal). NaN with one class only.

    labels: 0 or 1, [N]; scores: float [N]. By the rank-sum (Mann-Whitney) statistic with mean ranks for ties.
    """
    labels = np.asarray(labels) > 0.5
    return (
        float(_grouped_auc(np.zeros(len(labels), np.int64), labels, np.asarray(scores))[1][0])
        if len(labels)
        else np.nan
    )


def gauc(groups: ArrayLike, labels: ArrayLike, scores: ArrayLike) -> float:
    """Mean AUC by group (user), weighted by rows; groups with one class only are left out (Zhu et al., KDD'17, §5.2).

    groups: int64 [N], any order. NaN where no group has both classes.
    """
    labels = np.asarray(labels) > 0.5
    if not len(labels):
        return float("nan")
    rows, aucs = _grouped_auc(np.asarray(groups), labels, np.asarray(scores))
    defined = ~np.isnan(aucs)
    return float(np.average(aucs[defined], weights=rows[defined])) if defined.any() else float("nan")


def logloss(labels: ArrayLike, scores: ArrayLike) -> float:
    """Mean cross-entropy; scores are probabilities, kept 1e-15 away from 0 and 1."""
    y, p = np.asarray(labels, np.float64), np.clip(np.asarray(scores, np.float64), 1e-15, 1 - 1e-15)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log1p(-p)))


def calibration(labels: ArrayLike, scores: ArrayLike) -> float:
    """Mean prediction over observed rate: 1 is right, above 1 predicts too much. NaN without positives."""
    observed = np.asarray(labels, np.float64).sum()
    return float(np.asarray(scores, np.float64).sum() / observed) if observed > 0 else float("nan")


def task_metrics(labels: ArrayLike, scores: ArrayLike, groups: ArrayLike | None = None) -> dict[str, float]:
    """All of the above for one task; `gauc` only where there are groups."""
    metrics = {
        "auc": auc(labels, scores),
        "logloss": logloss(labels, scores),
        "calibration": calibration(labels, scores),
    }
    if groups is not None:
        metrics["gauc"] = gauc(groups, labels, scores)
    return metrics


def mean_auc(metrics: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over the tasks that have one: what early stopping and the choice of the best checkpoint look at."""
    aucs = [values["auc"] for values in metrics.values() if not np.isnan(values["auc"])]
    return float(np.mean(aucs)) if aucs else float("nan")


def _grouped_auc(
    groups: NDArray[np.int64], labels: NDArray[np.bool_], scores: NDArray[np.floating]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(rows, auc) of each group. One sort by group and score; equal scores of a group share their mean rank."""
    order = np.lexsort((scores, groups))
    groups, labels, scores = groups[order], labels[order], scores[order]
    group_starts = np.flatnonzero(np.append(True, groups[1:] != groups[:-1]))
    rows = np.diff(np.append(group_starts, len(groups)))

    tie = np.append(True, (groups[1:] != groups[:-1]) | (scores[1:] != scores[:-1]))
    tie_starts = np.flatnonzero(tie)
    tie_rows = np.diff(np.append(tie_starts, len(groups)))
    mean_position = np.repeat(tie_starts + (tie_rows - 1) / 2, tie_rows)
    ranks = mean_position - np.repeat(group_starts, rows) + 1

    positives = np.add.reduceat(labels.astype(np.float64), group_starts)
    negatives = rows - positives
    rank_sum = np.add.reduceat(np.where(labels, ranks, 0.0), group_starts)
    with np.errstate(divide="ignore", invalid="ignore"):
        return rows, (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)
