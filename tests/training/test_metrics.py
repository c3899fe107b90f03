"""Metrics against scikit-learn and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from torchrank.training.metrics import auc, calibration, gauc, logloss, task_metrics


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(2, 2000))
    scores = rng.random(rows)
    if seed % 2:
        scores = np.round(scores, 1)  # many ties
    labels = (rng.random(rows) < scores * rng.random()).astype(np.float32)
    labels[:2] = 0, 1
    return labels, scores.astype(np.float32), rng.integers(0, 50, rows) * 2**40


@pytest.mark.parametrize("seed", range(20))
def test_auc_and_logloss_are_those_of_scikit_learn(seed: int) -> None:
    labels, scores, _ = random_case(seed)
    assert auc(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    inside = np.clip(scores, 0.01, 0.99).astype(np.float64)
    assert logloss(labels, inside) == pytest.approx(sk.log_loss(labels, inside), rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_gauc_is_the_weighted_mean_over_groups_with_both_classes(seed: int) -> None:
    labels, scores, groups = random_case(seed)
    total, rows = 0.0, 0
    for group in np.unique(groups):
        of = groups == group
        if 0 < labels[of].sum() < of.sum():
            total += of.sum() * sk.roc_auc_score(labels[of], scores[of])
            rows += of.sum()
    assert gauc(groups, labels, scores) == pytest.approx(total / rows if rows else np.nan, abs=1e-12, nan_ok=True)


def test_metrics_of_one_class_are_not_a_number() -> None:
    assert np.isnan(auc([1, 1], [0.1, 0.2]))
    assert np.isnan(auc([], []))
    assert np.isnan(gauc([1, 2], [0, 1], [0.1, 0.2]))
    assert np.isnan(calibration([0, 0], [0.1, 0.2]))


def test_calibration_is_predicted_over_observed() -> None:
    assert calibration([1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5]) == 2.0


def test_extreme_scores_keep_logloss_finite() -> None:
    assert 30 < logloss([1, 0], [0.0, 0.0]) * 2 < 40


def test_gauc_only_where_there_are_groups() -> None:
    assert set(task_metrics([0, 1], [0.2, 0.3])) == {"auc", "logloss", "calibration"}
    assert task_metrics([0, 1], [0.2, 0.3], [7, 7])["gauc"] == 1.0
