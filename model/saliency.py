"""Saliency maps that the method is compared with: class activation maps of the last layer or of
several, and gradient saliency.

Maps are float32 [B, H, W] of images, normalized float [B, 3, H, W], for a class per image, int64
[B]: the true one, since top-1 localization counts an image only where the prediction is right.
"""

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.classifier import Classifier

BLUR_SHARE = 3 / 64  # standard deviation of the blur, as a share of the side


def class_activation_map(classifier: Classifier, images: Tensor, classes: Tensor) -> Tensor:
    """Return CAM (Zhou et al. 2016): the last features weighted as the class's logit weights them.
    Its mean at the features' own size is the class's logit less the bias."""
    with torch.no_grad():
        weights = classifier.head.weight[classes]
        maps = torch.einsum("bc,bchw->bhw", weights, classifier.features(images))
        return resize_maps(maps, images)


def gradient_weighted_cam(
    network: nn.Module, layer: nn.Module, images: Tensor, classes: Tensor
) -> Tensor:
    """Return Grad-CAM (Selvaraju et al. 2017) without its final ReLU: CAM for any network.

    layer: the module within `network` whose output [B, C, h, w] is read. Each of its channels is
    weighted by the class logit's gradient summed over positions, so the map is Grad-CAM times
    h * w, and where only average pooling and a linear layer follow, `class_activation_map`.
    """
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *call: outputs.append(call[2]))
    try:
        with torch.enable_grad():
            logits = network(images.detach().requires_grad_())
    finally:
        handle.remove()
    features = outputs[-1]
    score = logits.gather(1, classes.unsqueeze(1)).sum()
    (gradient,) = torch.autograd.grad(score, features)
    maps = torch.einsum("bc,bchw->bhw", gradient.sum(dim=(2, 3)), features.detach())
    return resize_maps(maps, images)


def layer_cams(
    classifier: Classifier, images: Tensor, classes: Tensor, *, enlargement: float = 1.0
) -> list[Tensor]:
    """Return LayerCAM (Jiang et al. 2021) of every layer whose map has the size of the last one:
    features x gradient where that is positive, summed over channels.

    enlargement: of the image's sides, bilinearly, before the classifier sees it.
    """
    views = images.detach()
    if enlargement != 1:
        views = functional.interpolate(
            views, scale_factor=enlargement, mode="bilinear", align_corners=False
        )
    with torch.enable_grad():
        maps = classifier.final_maps(views)
        score = classifier.classify(maps[-1]).gather(1, classes.unsqueeze(1)).sum()
    gradients = torch.autograd.grad(score, maps)
    return [
        resize_maps((values.detach().float() * gradient.float()).clamp(min=0).sum(dim=1), images)
        for values, gradient in zip(maps, gradients, strict=True)
    ]


def gradient_saliency(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return the largest magnitude, over the channels, of the class logit's gradient by the image
    (Simonyan et al. 2014)."""
    images = images.detach().requires_grad_()
    score = network(images).gather(1, classes.unsqueeze(1)).sum()
    (gradient,) = torch.autograd.grad(score, images)
    return gradient.abs().amax(dim=1)


def resize_maps(maps: Tensor, images: Tensor) -> Tensor:
    """Return maps [B, h, w] at the images' size, bilinearly."""
    return functional.interpolate(
        maps.unsqueeze(1), size=images.shape[-2:], mode="bilinear", align_corners=False
    ).squeeze(1)


def blur(maps: np.ndarray) -> np.ndarray:
    """Blur each map, float32 [B, H, W], by a Gaussian."""
    height, width = maps.shape[1:]
    sigmas = {"sigmaX": BLUR_SHARE * width, "sigmaY": BLUR_SHARE * height}
    blurred = [cv2.GaussianBlur(values, (0, 0), **sigmas) for values in maps]
    return np.stack(blurred) if blurred else maps
