"""The stacks of `train_stacked.py`: models that differ in their seeds, computed and trained as one by `torch.vmap`."""

import argparse
import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from train_together import Training, main

import engine
from runtime import UserError

EVALUATION_IMAGES = 10_000  # images per forward pass in an evaluation, over all models of the stack
EAGER_STEPS = 3  # steps before a CUDA graph is captured, so that libraries can initialise


class Projection(nn.Linear):
    """nn.Linear for vmap, under which PyTorch's ignores autocast if it has a bias."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return project(x, self.weight, self.bias)


class PatchProjection(nn.Conv2d):
    """A convolution whose patches do not overlap, as a matrix product, for which vmap is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D, H / patch, W / patch)."""
        height, width = self.kernel_size
        patches = x.unflatten(3, (-1, width)).unflatten(2, (-1, height))  # (B, C, rows, height, columns, width)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return project(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x·weightᵀ + bias in the type of the product."""
    product = F.linear(x, weight)
    return product if bias is None else product + bias.to(product.dtype)


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of the model, for `functional_call` with other weights."""
    model = copy.deepcopy(model)
    for module in model.modules():
        check_not_random(module)
        if type(module) is nn.Linear:
            module.__class__ = Projection
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # PyTorch's attention does not support vmap on a CPU
    convolution = model.patch_embed.proj
    if type(convolution) is nn.Conv2d and convolution.stride == convolution.kernel_size and convolution.groups == 1:
        convolution.__class__ = PatchProjection
    return model


def check_not_random(module: nn.Module) -> None:
    """Raise ``UserError`` for a module that draws random numbers, which --model-kwargs may have asked for."""
    probabilities = {
        nn.Dropout: "p",
        DropPath: "drop_prob",
        PatchDropout: "prob",
    }
    for kind, name in probabilities.items():
        if isinstance(module, kind) and getattr(module, name, 0):
            raise UserError(
                f"the model has a {kind.__name__} of {getattr(module, name)}, and train_stacked.py does not support "
                "random numbers in a model: use train_together.py"
            )


class StackedModel:
    """Models of one architecture, computed together; S is their number.

    Attributes:
        parameters, buffers: by name, each with S in front.
    """

    def __init__(self, models: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self.size = len(models)
        self.skeleton = skeleton_of(models[0])
        self.parameters, self.buffers = stack_module_state(list(models))
        self.dtype = dtype

    def _outputs(self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(self.skeleton, (parameters, buffers), (images,)).float()

    def _autocast(self, device: torch.device) -> torch.autocast:
        """Mixed precision without its cache of weights, which a CUDA graph does not allow."""
        return torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)

    def losses(self, criterion: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """The loss of each model on its batch: images (S, B, 3, H, W), targets (S, B) to (S,)."""

        def loss(parameters: dict, buffers: dict, images: Tensor, targets: Tensor) -> Tensor:
            return criterion(images, self._outputs(parameters, buffers, images), targets)

        self.skeleton.train()
        # vmap treats dropout as random even if its probability is 0.
        stacked = torch.vmap(loss, randomness="different")
        with self._autocast(images.device):
            return stacked(self.parameters, self.buffers, images, targets)

    @torch.no_grad()
    def evaluate(self, images: Tensor, targets: Tensor) -> Tensor:
        """The sums of `engine.batch_sums` over all images, which all models share: (N, 3, H, W), (N,) to (S, 4)."""

        def sums(parameters: dict, buffers: dict, images: Tensor, targets: Tensor) -> Tensor:
            return engine.batch_sums(self._outputs(parameters, buffers, images).double(), targets)

        self.skeleton.eval()
        chunk_size = max(1, EVALUATION_IMAGES // self.size)
        stacked = torch.vmap(sums, in_dims=(0, 0, None, None))
        with self._autocast(images.device):
            return sum(
                stacked(self.parameters, self.buffers, *chunk)
                for chunk in zip(images.split(chunk_size), targets.split(chunk_size), strict=True)
            )


class Stack:
    """Trainings that differ only in their seed.

    Args:
        rows: for each training, the index of its batch among those given to `step`.
    """

    def __init__(self, trainings: list[Training], rows: list[int], device: torch.device) -> None:
        self.trainings = trainings
        self.device = device
        first = trainings[0]
        self.criterion = first.criterion
        self.model = StackedModel([t.state.model for t in trainings], main.amp_dtype(first.run.args, device))
        self.rows = torch.tensor(rows, device=device)
        self.optimizer = self._stack_optimizer()
        # The stacks run side by side on the GPU, each in a stream of its own.
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0
        self._loss: Tensor | None = None
        self._losses: list[Tensor] = []

    def _stack_optimizer(self) -> torch.optim.Optimizer:
        """An AdamW with the hyperparameters and the state of the trainings' optimizers."""
        first = self.trainings[0].state
        names = {parameter: name for name, parameter in first.model.named_parameters()}
        groups = []
        for group in first.optimizer.param_groups:
            options = {key: value for key, value in group.items() if key != "params"}
            if self.device.type == "cuda":  # a CUDA graph reads the learning rate and the step from the GPU
                options |= {"fused": True, "capturable": True, "lr": torch.tensor(group["lr"], device=self.device)}
            groups.append({**options, "params": [self.model.parameters[names[p]] for p in group["params"]]})
        optimizer = torch.optim.AdamW(groups)
        for name, parameter in self.model.parameters.items():
            states = [self._state_of(training, name) for training in self.trainings]
            if states[0]:
                optimizer.state[parameter] = {
                    key: states[0][key].to(self.device) if key == "step" else torch.stack([s[key] for s in states])
                    for key in states[0]
                }
        return optimizer

    @staticmethod
    def _state_of(training: Training, name: str) -> dict[str, Tensor]:
        """The optimizer's state of a parameter in a training of its own."""
        return training.state.optimizer.state.get(training.state.model.get_parameter(name), {})

    @property
    def commands(self) -> list[argparse.Namespace]:
        """The flags of the trainings."""
        return [training.run.args for training in self.trainings]

    def start_epoch(self, training: Training) -> None:
        """Take over the learning rates that the schedule of a training has set.

        Args:
            training: one that has not failed: the schedules of the others have stopped.
        """
        for group, own in zip(self.optimizer.param_groups, training.state.optimizer.param_groups, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(own["lr"])
            else:
                group["lr"] = own["lr"]
        self._losses = []

    def step(self, images: Tensor, targets: Tensor) -> None:
        """Start one step of each training; on a GPU, `wait` has to follow before the next one.

        Args:
            images, targets: (seeds, B, 3, H, W) and (seeds, B), the same tensors in every step, with new content.
        """
        if self._stream is None:
            self._run(images, targets)
        else:
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                self._run_graph(images, targets)
        self._steps += 1

    def wait(self) -> None:
        """Let what follows on the GPU wait for this step."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _run_graph(self, images: Tensor, targets: Tensor) -> None:
        """Run a step as a CUDA graph, after a few steps without one."""
        if self._steps < EAGER_STEPS:
            self._run(images, targets)
        else:
            if self._graph is None:
                self._graph = self._capture(images, targets)
            self._graph.replay()
            self._losses.append(self._loss.clone())

    def _capture(self, images: Tensor, targets: Tensor) -> "torch.cuda.CUDAGraph":
        """Record a step as a CUDA graph, which writes its losses to `_loss`."""
        graph = torch.cuda.CUDAGraph()
        cause = None
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                try:
                    self._loss = self._compute(images, targets)
                except RuntimeError as error:  # the end of the capture would hide it behind an error of its own
                    cause = error
        except RuntimeError as error:
            raise cause or error from None
        if cause:
            raise cause
        return graph

    def release(self) -> None:
        """Free the memory of a stack whose trainings have all failed."""
        self.wait()
        self._graph, self._losses, self._loss = None, [], None
        self.model, self.optimizer = None, None
        if self._stream is not None:
            torch.cuda.empty_cache()

    def _run(self, images: Tensor, targets: Tensor) -> None:
        self._losses.append(self._compute(images, targets))

    def _compute(self, images: Tensor, targets: Tensor) -> Tensor:
        """One step of the optimizer; returns the losses."""
        self.optimizer.zero_grad()
        loss = self.model.losses(self.criterion, images[self.rows], targets[self.rows])
        loss.sum().backward()
        self.optimizer.step()
        return loss.detach()

    def mean_losses(self) -> list[float]:
        """The mean loss of each training in this epoch."""
        return torch.stack(self._losses).double().mean(0).tolist()

    @torch.no_grad()
    def unstack(self) -> None:
        """Copy the weights and the optimizer's state to the trainings, which save them."""
        for row, training in enumerate(self.trainings):
            model, optimizer = training.state.model, training.state.optimizer
            names = {parameter: name for name, parameter in model.named_parameters()}
            for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                stacked = self.model.parameters[names[parameter]]
                parameter.copy_(stacked[row])
                optimizer.state[parameter] = {
                    key: value.cpu().clone() if key == "step" else value[row].clone()
                    for key, value in self.optimizer.state[stacked].items()
                }
            for name, buffer in model.named_buffers():
                buffer.copy_(self.model.buffers[name][row])
