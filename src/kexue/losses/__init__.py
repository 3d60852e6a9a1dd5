"""Losses that replace cross entropy and its relatives."""

import pkgutil as _pkgutil

import lazy_loader as _lazy

_NAMES = {
    "contrastive": [
        "info_nce",
        "label_vectors",
        "nt_xent",
    ],
    "policy_gradient": [
        "PolicyGradientLoss",
        "end_mask",
        "expected_reward",
        "optimal_baseline",
        "policy_gradient_loss",
        "sample_actions",
        "sentence_bleu",
        "sequence_log_probability",
        "token_accuracy",
        "token_f1",
    ],
    "tailr": [
        "ReliabilityDiagram",
        "TaiLrLoss",
        "expected_calibration_error",
        "linear_tailr_loss",
        "reliability_diagram",
        "tailr_loss",
        "token_weight",
    ],
}

_present = {m.name for m in _pkgutil.iter_modules(__path__)}

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submodules=sorted(_present),
    submod_attrs={module: names for module, names in _NAMES.items() if module in _present},
)
