"""DETR: the detector, its loss and the way from its outputs to boxes in pixels."""

import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from util import runtime
from util.box_ops import box_cxcywh_to_xyxy
from util.misc import NestedTensor, nested_tensor_from_tensor_list

from .segmentation import dice_loss, enlarge


class MLP(nn.Module):
    """Linear layers with ReLU between them, from `input_dim` over `hidden_dim` to `output_dim` channels."""

    def __init__(self, input_dim, hidden_dim, output_dim, num_layers):
        super().__init__()
        widths = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(itertools.starmap(nn.Linear, itertools.pairwise(widths)))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DETR(nn.Module):
    """Detector of a fixed number of objects.

    Args:
        backbone: gives maps and their positions, as `Joiner`.
        transformer: as `Transformer`.
        num_classes: K; the last of K + 1 logits means "no object".
        num_queries: Q, the most objects it can find in a picture.
        aux_loss: also return the predictions of the decoder's earlier layers, for their losses.
    """

    def __init__(self, backbone, transformer, num_classes, num_queries, aux_loss=False):
        super().__init__()
        d_model = transformer.d_model
        self.transformer = transformer
        self.class_embed = nn.Linear(d_model, num_classes + 1)
        self.bbox_embed = MLP(d_model, d_model, 4, 3)
        self.query_embed = nn.Embedding(num_queries, d_model)
        self.input_proj = nn.Conv2d(backbone.num_channels, d_model, kernel_size=1)
        self.backbone = backbone
        self.num_queries, self.aux_loss = num_queries, aux_loss

    def forward(self, samples):
        """Detect.

        Args:
            samples: NestedTensor, tensor (B, 3, H, W) or list of tensors (3, H, W), normalised as for ImageNet.
        Returns: dict with `pred_logits` (B, Q, K + 1), `pred_boxes` (B, Q, 4) as (cx, cy, w, h) in shares of the
            picture without its padding, and with aux_loss `aux_outputs`, a list of such dicts, first layer first.
        """
        return self.predict(self.encode(samples)[2])

    def encode(self, samples):
        """Samples → the backbone's maps (list of NestedTensor), the last of them projected (B, C, H, W), the tokens of
        every decoder layer (layers, B, Q, C) and the encoder's map (B, C, H, W)."""
        if not isinstance(samples, NestedTensor):
            samples = nested_tensor_from_tensor_list(samples)
        maps, positions = self.backbone(samples)
        projected = self.input_proj(maps[-1].tensors)
        return maps, projected, *self.transformer(projected, maps[-1].mask, self.query_embed.weight, positions[-1])

    def predict(self, tokens):
        """Tokens (layers, B, Q, C) → what `forward` returns."""
        layers = [
            {"pred_logits": logits, "pred_boxes": boxes}
            for logits, boxes in zip(self.class_embed(tokens), self.bbox_embed(tokens).sigmoid(), strict=True)
        ]
        return {**layers[-1], "aux_outputs": layers[:-1]} if self.aux_loss else layers[-1]


class SetCriterion(nn.Module):
    """The losses of the matched predictions, for every decoder layer, with one device-to-host copy in all.

    Args:
        num_classes: K.
        matcher: as `HungarianMatcher`.
        weight_dict: name of a loss → its weight in the total.
        eos_coef: weight of "no object" in the cross-entropy.
        losses: which to compute, of `labels`, `boxes`, `cardinality`, `masks`.

    Attributes:
        training_group: the process group of training steps; None for the default group. main.py sets it.
    """

    def __init__(self, num_classes, matcher, weight_dict, eos_coef, losses=("labels", "boxes", "cardinality")):
        super().__init__()
        self.num_classes, self.matcher, self.weight_dict = num_classes, matcher, weight_dict
        self.losses = [getattr(self, f"_loss_{name}") for name in losses]
        self.training_group = None
        weight = torch.ones(num_classes + 1)
        weight[-1] = eos_coef
        self.register_buffer("empty_weight", weight)

    def forward(self, outputs, targets):
        """All losses by name; those of the earlier layers end in _0, _1, ...

        Args:
            outputs: of `DETR`.
            targets: for each picture a dict with `labels` (n,) and `boxes` (n, 4), normalised (cx, cy, w, h), and with
                the loss `masks` also `masks` (n, height, width), bool.
        In training box losses are divided by the mean number of boxes over the processes, at least 1; in evaluation
        by that of this batch alone, since processes may have different numbers of batches.
        """
        layers = [*outputs.get("aux_outputs", ()), outputs]
        logits, boxes = (torch.stack([x[name] for x in layers]).float() for name in ("pred_logits", "pred_boxes"))
        matches = self.matcher.match_layers(logits, boxes, targets).to(logits.device, non_blocking=True)
        values = {}
        for loss in self.losses:
            values.update(loss(logits, boxes, outputs.get("pred_masks"), targets, matches))
        suffixes = [f"_{i}" for i in range(len(layers) - 1)] + [""]
        return {
            f"{name}{suffix}": value
            for name, per_layer in values.items()
            for suffix, value in zip(suffixes[-len(per_layer) :], per_layer, strict=True)
        }

    def _loss_labels(self, logits, boxes, masks, targets, matches):
        """Weighted cross-entropy, and the share of matched objects in another class (%)."""
        layer, picture, query, obj = matches
        labels = torch.cat([t["labels"] for t in targets])[obj]
        classes = torch.full(logits.shape[:3], self.num_classes, device=logits.device)
        classes[layer, picture, query] = labels
        entropy = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), self.empty_weight, reduction="none")
        loss = entropy.view(len(logits), -1).sum(1) / self.empty_weight[classes].flatten(1).sum(1).clamp(min=1e-30)
        right = (logits[layer, picture, query].argmax(-1) == labels).view(len(logits), -1)[-1:]  # of the last layer
        return {"loss_ce": loss, "class_error": 100 - 100 * right.float().sum(1) / max(right.shape[1], 1)}

    def _loss_boxes(self, logits, boxes, masks, targets, matches):
        """L1 and GIoU."""
        layer, picture, query, obj = matches
        found, wanted = boxes[layer, picture, query], torch.cat([t["boxes"] for t in targets])[obj]
        l1 = F.l1_loss(found, wanted, reduction="none").sum(1)
        giou = generalized_box_iou_loss(box_cxcywh_to_xyxy(found), box_cxcywh_to_xyxy(wanted), eps=0.0)
        num_boxes = self._num_boxes(targets, boxes.device)
        return {
            name: loss.view(len(boxes), -1).sum(1) / num_boxes
            for name, loss in (("loss_bbox", l1), ("loss_giou", giou))
        }

    def _loss_cardinality(self, logits, boxes, masks, targets, matches):
        """How far the number of predicted objects is from the number of objects; not trained on."""
        sizes = torch.tensor([len(t["labels"]) for t in targets], device=logits.device)
        found = (logits.argmax(-1) != self.num_classes).sum(-1)  # (layers, B)
        return {"cardinality_error": (found - sizes).abs().float().mean(1)}

    def _loss_masks(self, logits, boxes, masks, targets, matches):
        """Focal and dice loss of the last layer's masks, on the pixels of the padded pictures."""
        _, picture, query, obj = matches.view(4, len(logits), -1)[:, -1]
        height, width = (max(t["masks"].shape[axis] for t in targets) for axis in (1, 2))
        wanted = torch.cat(
            [F.pad(t["masks"], (0, width - t["masks"].shape[2], 0, height - t["masks"].shape[1])) for t in targets]
        )[obj].float()
        found = enlarge(masks[picture, query], (height, width))
        num_boxes = self._num_boxes(targets, masks.device)
        focal = sigmoid_focal_loss(found, wanted, alpha=0.25, gamma=2).mean((1, 2))
        return {
            name: loss.sum()[None] / num_boxes
            for name, loss in (("loss_mask", focal), ("loss_dice", dice_loss(found, wanted)))
        }

    def _num_boxes(self, targets, device):
        count = torch.full((), float(sum(len(t["labels"]) for t in targets)), device=device)  # torch.tensor would wait
        if self.training and dist.is_initialized():
            count = runtime.all_reduce_sum(count, self.training_group) / runtime.get_world_size()
        return count.clamp(min=1)


class PostProcess(nn.Module):
    """Outputs of the model → detections in pixels."""

    @torch.no_grad()
    def forward(self, outputs, target_sizes):
        """Best class of every query.

        Args:
            outputs: of `DETR`.
            target_sizes: (B, 2), height and width of the original pictures.
        Returns: for each picture a dict of `scores` (Q,), `labels` (Q,) and `boxes` (Q, 4) as corners in pixels.
        """
        scores, labels = outputs["pred_logits"].float().softmax(-1)[..., :-1].max(-1)
        height, width = target_sizes.unbind(1)
        scale = torch.stack([width, height, width, height], dim=1)[:, None]
        boxes = box_cxcywh_to_xyxy(outputs["pred_boxes"].float()) * scale
        return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes, strict=True)]
