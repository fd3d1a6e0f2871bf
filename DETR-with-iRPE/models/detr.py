"""DETR: the detector, its losses, and the conversion of its outputs to boxes in pixels."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from util import runtime
from util.box_ops import box_cxcywh_to_xyxy
from util.misc import NestedTensor, nested_tensor_from_tensor_list

from .matcher import Matches
from .segmentation import dice_loss, enlarge

Targets = Sequence[dict[str, torch.Tensor]]  # one dict for each image of a batch, see `SetCriterion.forward`


class MLP(nn.Module):
    """`num_layers` linear layers with ReLU between them: `input_dim` to `hidden_dim` to `output_dim` channels."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(nn.Linear(before, after) for before, after in itertools.pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., input_dim) → (..., output_dim)"""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DETR(nn.Module):
    """The detector.

    Args:
        backbone: a `Joiner`, which computes feature maps and position encodings.
        transformer: a `Transformer`.
        num_classes: K. The model predicts K + 1 logits, of which the last means "no object".
        num_queries: Q, the largest number of objects that the model can detect in an image.
        aux_loss: also return the predictions of the earlier decoder layers, for auxiliary losses.
    """

    def __init__(
        self, backbone: nn.Module, transformer: nn.Module, num_classes: int, num_queries: int, aux_loss: bool = False
    ) -> None:
        super().__init__()
        d_model = transformer.d_model
        self.transformer = transformer
        self.class_embed = nn.Linear(d_model, num_classes + 1)
        self.bbox_embed = MLP(d_model, d_model, 4, 3)
        self.query_embed = nn.Embedding(num_queries, d_model)
        self.input_proj = nn.Conv2d(backbone.num_channels, d_model, kernel_size=1)
        self.backbone = backbone
        self.num_queries = num_queries
        self.aux_loss = aux_loss

    def forward(self, samples: NestedTensor | torch.Tensor | Sequence[torch.Tensor]) -> dict[str, Any]:
        """Detect objects.

        Args:
            samples: NestedTensor, tensor (B, 3, H, W) or list of tensors (3, H, W), normalised as for ImageNet.
        Returns: dict with `pred_logits` (B, Q, K + 1) and `pred_boxes` (B, Q, 4), which are (cx, cy, w, h) relative to
            the size of the image without padding. With `aux_loss`, `aux_outputs` is a list of such dicts, one for each
            earlier decoder layer in order.
        """
        _, _, tokens, _ = self.encode(samples)
        return self.predict(tokens)

    def encode(
        self, samples: NestedTensor | torch.Tensor | Sequence[torch.Tensor]
    ) -> tuple[list[NestedTensor], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run everything up to the prediction heads.

        Args:
            samples: as for `forward`.
        Returns: the backbone's feature maps, the projection of the last one (B, C, H, W), the object tokens of every
            decoder layer (layers, B, Q, C), and the encoder's output as a map (B, C, H, W).
        """
        if not isinstance(samples, NestedTensor):
            samples = nested_tensor_from_tensor_list(samples)
        maps, positions = self.backbone(samples)
        projected = self.input_proj(maps[-1].tensors)
        tokens, memory = self.transformer(projected, maps[-1].mask, self.query_embed.weight, positions[-1])
        return maps, projected, tokens, memory

    def predict(self, tokens: torch.Tensor) -> dict[str, Any]:
        """Compute the result of `forward` from the object tokens (layers, B, Q, C)."""
        all_logits = self.class_embed(tokens)
        all_boxes = self.bbox_embed(tokens).sigmoid()
        layers = [
            {"pred_logits": logits, "pred_boxes": boxes} for logits, boxes in zip(all_logits, all_boxes, strict=True)
        ]
        return {**layers[-1], "aux_outputs": layers[:-1]} if self.aux_loss else layers[-1]


class SetCriterion(nn.Module):
    """The losses of the matched predictions of all decoder layers, computed with a single copy from device to host.

    Args:
        num_classes: K.
        matcher: a `HungarianMatcher`.
        weight_dict: weights of the losses in the total loss, by name.
        eos_coef: weight of the class "no object" in the cross-entropy.
        losses: the losses to compute: `labels`, `boxes`, `cardinality`, `masks`.

    Attributes:
        training_group: the process group of training steps, or None for the default group. main.py sets it.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        eos_coef: float,
        losses: Sequence[str] = ("labels", "boxes", "cardinality"),
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.losses = losses
        self.training_group = None
        weight = torch.ones(num_classes + 1)
        weight[-1] = eos_coef
        self.register_buffer("empty_weight", weight)

    def forward(self, outputs: dict[str, Any], targets: Targets) -> dict[str, torch.Tensor]:
        """Compute the losses.

        In training, box and mask losses are divided by the mean number of objects over all ranks, at least 1. In
        evaluation, they are divided by the number of objects in this rank's batch, at least 1, because ranks may have
        different numbers of batches.

        Args:
            outputs: the output of `DETR`.
            targets: for each image a dict with `labels` (n,) and `boxes` (n, 4), normalised (cx, cy, w, h); for the
                loss `masks` also `masks` (n, height, width), bool.
        Returns: the losses by name. Names of the earlier layers' losses end in `_0`, `_1`, ...
        """
        layers = [*outputs.get("aux_outputs", ()), outputs]
        logits = torch.stack([layer["pred_logits"] for layer in layers]).float()
        boxes = torch.stack([layer["pred_boxes"] for layer in layers]).float()
        matches = self.matcher.match_layers(logits, boxes, targets).to(logits.device)
        named = {}
        for loss in self.losses:
            if loss == "labels":
                values = self._loss_labels(logits, targets, matches)
            elif loss == "boxes":
                values = self._loss_boxes(boxes, targets, matches)
            elif loss == "cardinality":
                values = self._loss_cardinality(logits, targets)
            elif loss == "masks":
                values = self._loss_masks(outputs["pred_masks"], targets, matches.of_last_layer(len(layers)))
            else:
                raise ValueError(f"unknown loss {loss!r}: expected labels, boxes, cardinality or masks")
            for name, per_layer in values.items():
                named.update(_name_layers(name, per_layer))
        return named

    # Each of the following methods returns its losses by name, as tensors (layers,). Losses of the last layer only have
    # shape (1,).

    def _loss_labels(self, logits: torch.Tensor, targets: Targets, matches: Matches) -> dict[str, torch.Tensor]:
        """Weighted cross-entropy, and the percentage of matched objects that the last layer misclassifies."""
        num_layers = len(logits)
        matched_labels = torch.cat([t["labels"] for t in targets])[matches.object]
        classes = torch.full(logits.shape[:3], self.num_classes, device=logits.device)
        classes[matches.layer, matches.image, matches.query] = matched_labels
        entropy = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), self.empty_weight, reduction="none")
        total_weight = self.empty_weight[classes].flatten(1).sum(1).clamp(min=1e-30)
        loss = entropy.view(num_layers, -1).sum(1) / total_weight
        predicted = logits[matches.layer, matches.image, matches.query].argmax(-1)
        correct = (predicted == matched_labels).view(num_layers, -1)[-1:]  # of the last layer
        class_error = 100 - 100 * correct.float().sum(1) / max(correct.shape[1], 1)
        return {"loss_ce": loss, "class_error": class_error}

    def _loss_boxes(self, boxes: torch.Tensor, targets: Targets, matches: Matches) -> dict[str, torch.Tensor]:
        """L1 and GIoU losses."""
        num_layers = len(boxes)
        predicted = boxes[matches.layer, matches.image, matches.query]
        true = torch.cat([t["boxes"] for t in targets])[matches.object]
        l1 = F.l1_loss(predicted, true, reduction="none").sum(1)
        giou = generalized_box_iou_loss(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(true), eps=0.0)
        num_boxes = self._num_boxes(targets, boxes.device)
        return {
            "loss_bbox": l1.view(num_layers, -1).sum(1) / num_boxes,
            "loss_giou": giou.view(num_layers, -1).sum(1) / num_boxes,
        }

    def _loss_cardinality(self, logits: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        """Absolute error of the number of predicted objects. It is logged, and no gradient flows through it."""
        true_counts = torch.tensor([len(t["labels"]) for t in targets], device=logits.device)
        counts = (logits.argmax(-1) != self.num_classes).sum(-1)  # (layers, B)
        return {"cardinality_error": (counts - true_counts).abs().float().mean(1)}

    def _loss_masks(self, masks: torch.Tensor, targets: Targets, matches: Matches) -> dict[str, torch.Tensor]:
        """Focal and dice losses of the last layer's masks, over all pixels of the padded images."""
        height = max(t["masks"].shape[1] for t in targets)
        width = max(t["masks"].shape[2] for t in targets)
        padded = [F.pad(t["masks"], (0, width - t["masks"].shape[2], 0, height - t["masks"].shape[1])) for t in targets]
        true = torch.cat(padded)[matches.object].float()
        predicted = enlarge(masks[matches.image, matches.query], (height, width))
        num_boxes = self._num_boxes(targets, masks.device)
        focal = sigmoid_focal_loss(predicted, true, alpha=0.25, gamma=2).mean((1, 2))
        return {
            "loss_mask": focal.sum()[None] / num_boxes,
            "loss_dice": dice_loss(predicted, true).sum()[None] / num_boxes,
        }

    def _num_boxes(self, targets: Targets, device: torch.device) -> torch.Tensor:
        """The divisor of box and mask losses (see `forward`), a scalar on the device."""
        # torch.full fills on the device; torch.tensor would copy from the host and wait for the device.
        count = torch.full((), float(sum(len(t["labels"]) for t in targets)), device=device)
        if self.training and dist.is_initialized():
            count = runtime.all_reduce_sum(count, self.training_group) / runtime.get_world_size()
        return count.clamp(min=1)


def _name_layers(name: str, per_layer: torch.Tensor) -> dict[str, torch.Tensor]:
    """The values of a loss by layer: `{name}_0`, `{name}_1`, ... for the earlier layers and `name` for the last."""
    *earlier, last = per_layer
    return {**{f"{name}_{number}": value for number, value in enumerate(earlier)}, name: last}


class PostProcess(nn.Module):
    """Converts the outputs of the model to detections in pixels."""

    @torch.no_grad()
    def forward(self, outputs: dict[str, Any], target_sizes: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        """Take the most probable class of every query, and scale its box.

        Args:
            outputs: the output of `DETR`.
            target_sizes: (B, 2), height and width of the original images in pixels.
        Returns: for each image a dict with `scores` (Q,), `labels` (Q,) and `boxes` (Q, 4), which are corners in
            pixels.
        """
        scores, labels = outputs["pred_logits"].float().softmax(-1)[..., :-1].max(-1)
        height, width = target_sizes.unbind(1)
        scale = torch.stack([width, height, width, height], dim=1)[:, None]
        boxes = box_cxcywh_to_xyxy(outputs["pred_boxes"].float()) * scale
        return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes, strict=True)]
