r"""RoFormerV2: a rotary encoder without biases and norm parameters, and its pre-training.

.. math::
    x \leftarrow N(x + \alpha F(x)), \qquad N(x) = x / \sqrt{\operatorname{mean}(x^2) + \varepsilon}

The published Chinese checkpoints load from TensorFlow's and PyTorch's files alike, without
TensorFlow; what is no RoFormerV2 is refused. Beside the models stand what the recipe needs: a
tokenizer, whole-word masking, the warm-up of α, the learning rate, and a trainer for many tasks
with gradients of equal length.

References
----------
Su Jianlin, "RoFormerV2：自然语言理解的极限探索"; ZhuiyiAI, "RoFormerV2: A Faster and Better
RoFormer", 2022. Su et al., arXiv 2104.09864: rotary positions. Liu et al., arXiv 1901.11504:
multi-task pre-training.

Examples
--------
>>> config = RoFormerV2Config(vocab_size=30, hidden_size=8, num_hidden_layers=2,
...     num_attention_heads=2, intermediate_size=16)
>>> sum(parameter.numel() for parameter in RoFormerV2ForMaskedLM(config).parameters())
1280
"""

from kexue.models.roformer.configuration import RoFormerV2Config
from kexue.models.roformer.encoder import EncoderOutput, RoFormerV2Model
from kexue.models.roformer.heads import (
    ClassifierOutput,
    MaskedLanguageModelOutput,
    RoFormerV2ForMaskedLM,
    RoFormerV2ForSequenceClassification,
)
from kexue.models.roformer.initialization import initialize_weights
from kexue.models.roformer.multitask import MultiTaskTrainer, Task, TrainingHistory
from kexue.models.roformer.pretraining import MaskedBatch, MaskedLanguageModelCollator
from kexue.models.roformer.schedules import PiecewiseLinearLR, ResidualWarmup
from kexue.models.roformer.tensorflow import (
    convert_tensorflow_variables,
    read_tensorflow_checkpoint,
)
from kexue.models.roformer.tokenizer import RoFormerV2Tokenizer, TokenizedBatch

__all__ = [
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
]
