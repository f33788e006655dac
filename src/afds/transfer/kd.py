"""KD: learn what a fine-tuned dense network thinks of an image, not only its label.

::

    T^2 KL( softmax(teacher / T) || softmax(student / T) )

Hinton, Vinyals, Dean, *Distilling the Knowledge in a Neural Network*, 2015. The factor T^2 keeps the size of the
gradients. The teacher may be any network that knows the same classes: the student itself before it was cut, or the
larger one beside a smaller student.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from afds.transfer.base import Regulariser, Step


class LogitDistillation(Regulariser):
    name = "kd"

    def __init__(self, weight: float, temperature: float) -> None:
        super().__init__(weight)
        self.temperature = temperature

    def forward(self, step: Step) -> Tensor:
        assert step.teacher_logits is not None
        return logit_distillation(step.logits, step.teacher_logits, self.temperature)


def logit_distillation(logits_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) at a temperature, times its square so that gradients keep their size."""
    student = F.log_softmax(logits_BK.float() / temperature, 1)
    teacher = F.log_softmax(teacher_BK.float() / temperature, 1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean") * temperature**2
