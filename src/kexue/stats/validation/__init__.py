r"""Validation scores that estimate test scores, when the test inputs are known and differ.

Training rows come from :math:`p(x)`, test rows from :math:`q(x)`. A classifier that tells them
apart, trained on as many of one kind as of the other, tends to

.. math::
    D(x) = \frac{q(x)}{p(x) + q(x)}, \qquad w(x) = \frac{q(x)}{p(x)} = \frac{D(x)}{1 - D(x)},
    \qquad \mathbb{E}_q[f] = \mathbb{E}_p[w f].

:class:`TrainTestDiscriminator` fits it to any scikit-learn classifier and any rows, and gives
calibrated out-of-fold weights. :func:`importance_weighted_cross_val_score` scores with them,
:class:`AdversarialShuffleSplit` draws validation rows by them (for ``GridSearchCV`` and its like),
and :func:`drift_report` says whether train and test differ, and in which columns. All this is for
inputs that drift; where :math:`p(y|x)` differs, no split and no weight can help.

References
----------
Su Jianlin, "如何划分一个跟测试集更接近的验证集？": the two strategies. Sugiyama, Krauledat and
Müller, *Covariate Shift Adaptation by Importance Weighted Cross Validation*, JMLR 8. Pan et al.,
arXiv 2004.03045: adversarial validation against concept drift.

Examples
--------
Tomorrow's rows are shifted by one standard deviation; the weighted mean of today's knows it:

>>> import numpy as np
>>> rng = np.random.default_rng(0)
>>> today, tomorrow = rng.normal(0, 1, (4000, 1)), rng.normal(1, 1, (4000, 1))
>>> found = TrainTestDiscriminator(random_state=0).fit(today, tomorrow)
>>> round(float(np.average(today[:, 0], weights=found.weights_)), 1)
1.0
"""

from kexue.stats.validation.discriminator import TrainTestDiscriminator
from kexue.stats.validation.drift import DriftReport, drift_report
from kexue.stats.validation.scoring import (
    AdversarialShuffleSplit,
    importance_weighted_cross_val_score,
)

__all__ = [
    "AdversarialShuffleSplit",
    "DriftReport",
    "TrainTestDiscriminator",
    "drift_report",
    "importance_weighted_cross_val_score",
]
