"""Layer-wise relevance propagation (LRP)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from model.saliency import resize_maps

SMALLEST_PART = 1e-9  # a part nearer to 0 than this gets no relevance

# Functions that the rules treat alike. A normalization's number is its weight's position.
NORMALIZATIONS = {
    functional.batch_norm: 3,
    functional.instance_norm: 3,
    functional.group_norm: 2,
    functional.layer_norm: 2,
}
ACTIVATIONS = {
    functional.silu,
    functional.hardswish,
    functional.gelu,
    functional.mish,
    functional.elu,
    functional.relu6,
    functional.hardtanh,
}
GATES = {
    functional.sigmoid,
    functional.hardsigmoid,
    functional.softmax,
    torch.sigmoid,
    torch.softmax,
    Tensor.sigmoid,
    Tensor.sigmoid_,
    Tensor.softmax,
}


class _Explained(torch.autograd.Function):
    """A value whose gradient x input passes its relevance on to `part`, in proportion."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, part: Tensor) -> Tensor:
        small = part.abs() <= SMALLEST_PART
        ctx.save_for_backward((value / part).masked_fill_(small, 0))
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (ratio,) = ctx.saved_tensors
        return None, gradient * ratio


class _RelevanceRules(TorchFunctionMode):
    """While entered, gradient x input of what torch computes is layer-wise relevance: only
    gradients change, and those of linear layers, pooling, sums and ReLU share it in proportion
    already. ones: [B, 1, H, W], 1 for each pixel, whose gradient is the relevance."""

    def __init__(self) -> None:
        super().__init__()
        self.ones: Tensor | None = None
        self._convolved: tuple[Tensor, Callable[[Tensor], Tensor]] | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = kwargs or {}
        if func is functional.conv2d:
            return self._convolution(*args, **options)
        if func in NORMALIZATIONS:
            position = NORMALIZATIONS[func]
            scale = options.get("weight", args[position] if len(args) > position else None)
            # As one fixed factor per value: all relevance goes to the value that is normalized.
            return self._normalization(args[0], func(*args, **options).detach(), scale)
        if func in ACTIVATIONS:
            value = func(args[0].detach().clone(), *args[1:], **options)  # may work in place
            return _Explained.apply(value, args[0])
        if func in GATES:
            return func(args[0].detach().clone(), *args[1:], **options)  # a factor, no signal
        return func(*args, **options)

    def _convolution(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        weight = weight.detach()
        options = (stride, padding, dilation)
        with torch.no_grad():
            value = functional.conv2d(x, weight, bias, *options, groups)
        if self.ones is None:
            self.ones = torch.ones_like(x[:, :1]).requires_grad_()
            window = torch.ones_like(weight[:1, :1])
            return _Explained.apply(value, functional.conv2d(self.ones, window, None, *options))

        def positive(weight: Tensor) -> Tensor:
            """Return the sum of the positive terms x * weight alone."""
            above, below = weight.clamp(min=0), weight.clamp(max=0)
            if not bool((x.detach() < 0).any()):  # as after a ReLU: half the cost
                return functional.conv2d(x, above, None, *options, groups)
            high = functional.conv2d(x.clamp(min=0), above, None, *options, groups)
            return high + functional.conv2d(x.clamp(max=0), below, None, *options, groups)

        output = _Explained.apply(value, positive(weight))
        self._convolved = output, lambda signs: positive(weight * signs.view(-1, 1, 1, 1))
        return output

    def _normalization(self, x: Tensor, value: Tensor, scale: Tensor | None) -> Tensor:
        convolved, self._convolved = self._convolved, None
        if scale is not None and convolved is not None and x is convolved[0]:
            signs = scale.detach().sign()
            if bool((signs < 0).any()):  # what was negative before is positive after
                return _Explained.apply(value, convolved[1](signs))
        return _Explained.apply(value, x)


def layerwise_relevance(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return the relevance of each pixel for its class's logit (LRP, Bach et al. 2015), signed:
    float32 [B, H, W]; they sum up to the logit less what biases keep. Linear layers share it by
    weight * x, convolutions by the positive terms (z+), the first one evenly over its window
    (flat); normalizations and activations pass it on, sums share it, maxima give it to the largest;
    gates are factors. network: convolutional, of torch.nn layers or functions, in evaluation mode,
    uncompiled. images: normalized float [B, 3, H, W]; classes: int64 [B]."""
    rules = _RelevanceRules()
    with torch.enable_grad(), rules:
        logits = network(images.detach())
    assert rules.ones is not None
    score = logits.gather(1, classes.unsqueeze(1)).sum()
    (relevance,) = torch.autograd.grad(score, rules.ones)
    maps = relevance.squeeze(1)
    return maps if maps.shape[-2:] == images.shape[-2:] else resize_maps(maps, images)
