"""Distillation from a teacher (Touvron et al., "Training data-efficient image transformers", section 3)."""

import torch
import torch.nn.functional as F
from torch import nn


class DistillationLoss(nn.Module):
    """(1 - alpha) · base loss of the class head + alpha · distillation loss of the distillation head.

    Args:
        base_criterion: loss of (logits, targets).
        teacher_model: classifier in evaluation mode, run without gradients; may be None for type "none".
        distillation_type: "none", the base loss alone; "soft" (Eq. 2), tau² times the Kullback-Leibler divergence of
            the softmaxes at temperature tau, averaged over all B·K elements; "hard" (Eq. 3), the cross-entropy with
            the teacher's predicted class as the label.
        alpha: weight of the distillation loss, from 0 to 1.
        tau: temperature of the soft distillation.
    """

    def __init__(
        self,
        base_criterion: nn.Module,
        teacher_model: nn.Module | None,
        distillation_type: str,
        alpha: float,
        tau: float,
    ) -> None:
        super().__init__()
        if distillation_type not in ("none", "soft", "hard"):
            raise ValueError(f"distillation_type is {distillation_type!r}; it must be 'none', 'soft' or 'hard'")
        self.base_criterion, self.teacher_model = base_criterion, teacher_model
        self.distillation_type, self.alpha, self.tau = distillation_type, alpha, tau

    def forward(
        self, inputs: torch.Tensor, outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor
    ) -> torch.Tensor:
        """Scalar loss.

        Args:
            inputs: images (B, 3, H, W), for the teacher.
            outputs: logits (B, K), or for distillation the logits of the class and of the distillation head.
            targets: as the base loss takes them: (B,) class indices, or (B, K) probabilities.
        """
        class_logits, student = outputs if isinstance(outputs, tuple) else (outputs, None)
        loss = self.base_criterion(class_logits, targets)
        if self.distillation_type == "none":
            return loss
        if student is None:
            raise ValueError(
                "distillation needs a model that returns (class logits, distillation logits): "
                "call its set_distilled_training(True)"
            )
        with torch.no_grad():
            teacher = self.teacher_model(inputs)
        if self.distillation_type == "hard":
            distillation = F.cross_entropy(student, teacher.argmax(dim=1))
        else:
            divergence = F.kl_div(
                F.log_softmax(student / self.tau, dim=1),
                F.log_softmax(teacher / self.tau, dim=1),
                reduction="sum",
                log_target=True,
            )
            distillation = divergence * self.tau**2 / student.numel()
        return (1 - self.alpha) * loss + self.alpha * distillation
