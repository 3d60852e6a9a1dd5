r"""Logistic and softmax regression in closed form, from class means and one covariance.

Maximum likelihood has no closed form. Gaussian classes :math:`N(\mu_k, \Sigma)` with one
covariance and frequencies :math:`p_k` do: Bayes' rule leaves a softmax of linear functions,

.. math:: w_k = \mu_k \Sigma^{-1}, \qquad b_k = \ln p_k - \tfrac12 \mu_k \Sigma^{-1} \mu_k^\top,

where :math:`\Sigma` is the covariance *within* classes. All of it follows from sums over the data,
so training is one pass, and shards are merged exactly: `ClassMoments` keeps the sums,
`closed_form_softmax` is the formula, `AnalyticLogisticRegression` is the scikit-learn classifier.

Source: Su Jianlin, *A probabilistic view of linear models: has logistic regression an analytical
solution?*, https://kexue.fm/archives/8578. Shrinkage: Chen, Wiesel, Eldar and Hero, *Shrinkage
algorithms for MMSE covariance estimation*, https://arxiv.org/abs/0907.4698.
"""

from kexue.stats.logistic.classifier import AnalyticLogisticRegression
from kexue.stats.logistic.moments import ClassMoments
from kexue.stats.logistic.softmax import LinearSoftmax, closed_form_softmax

__all__ = ["AnalyticLogisticRegression", "ClassMoments", "LinearSoftmax", "closed_form_softmax"]
