"""Small networks that studies and users start from, and complete models."""

import pkgutil as _pkgutil

import lazy_loader as _lazy

_NAMES = {
    "embedding": ["TimeEmbedding"],
    "mlp": ["MLP", "MLPDenoiser"],
    "roformer": [
        "ClassifierOutput",
        "EncoderOutput",
        "MaskedBatch",
        "MaskedLanguageModelCollator",
        "MaskedLanguageModelOutput",
        "MultiTaskTrainer",
        "PiecewiseLinearLR",
        "ResidualWarmup",
        "RoFormerV2Config",
        "RoFormerV2ForMaskedLM",
        "RoFormerV2ForSequenceClassification",
        "RoFormerV2Model",
        "RoFormerV2Tokenizer",
        "Task",
        "TokenizedBatch",
        "TrainingHistory",
        "convert_tensorflow_variables",
        "initialize_weights",
        "read_tensorflow_checkpoint",
    ],
    "transformer": ["Transformer", "TransformerConfig"],
    "unet": ["SmallUNet"],
}

_present = {m.name for m in _pkgutil.iter_modules(__path__)}

__getattr__, __dir__, __all__ = _lazy.attach(
    __name__,
    submodules=sorted(_present),
    submod_attrs={module: names for module, names in _NAMES.items() if module in _present},
)
