"""Saliency maps that the method is compared with: float32 [B, H, W] of normalized images [B, 3, H,
W], for a class per image, int64 [B]: the true one."""

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model.classifier import Classifier
from model.pretrained import PretrainedClassifier

AnyClassifier = Classifier | PretrainedClassifier
BLUR_SHARE = 3 / 64  # standard deviation of the blur, as a share of the side


def class_activation_map(classifier: AnyClassifier, images: Tensor, classes: Tensor) -> Tensor:
    """Return CAM (Zhou et al. 2016): the last features, each channel weighted by the class logit's
    gradient summed over positions. Without average pooling and a linear layer after them that is
    Grad-CAM (Selvaraju et al. 2017) times the number of positions, without its final ReLU."""
    with torch.no_grad():
        features = classifier.features(images)
    with torch.enable_grad():
        offset = torch.zeros_like(features[:, :, :1, :1]).requires_grad_()
        score = classifier.classify(features + offset).gather(1, classes.unsqueeze(1)).sum()
    (weights,) = torch.autograd.grad(score, offset)
    return resize_maps((weights * features).sum(dim=1), images)


def layer_cams(
    classifier: AnyClassifier, images: Tensor, classes: Tensor, *, enlargement: float = 1.0
) -> list[Tensor]:
    """Return `layer_cams_of` the classifier's final maps, at the images' size. enlargement: of the
    image's sides, bilinearly, before the classifier sees it."""
    views = images.detach()
    if enlargement != 1:
        views = functional.interpolate(
            views, scale_factor=enlargement, mode="bilinear", align_corners=False
        )
    with torch.enable_grad():
        maps = classifier.final_maps(views)
    return [resize_maps(cam, images) for cam in layer_cams_of(classifier, maps, classes)]


def layer_cams_of(classifier: AnyClassifier, maps: list[Tensor], classes: Tensor) -> list[Tensor]:
    """Return LayerCAM (Jiang et al. 2021) of the classifier's `final_maps`, whose graph is used up:
    float32 [B, h, w] each, features x gradient where that is positive, summed over channels."""
    with torch.enable_grad():
        score = classifier.classify(maps[-1]).gather(1, classes.unsqueeze(1)).sum()
    gradients = torch.autograd.grad(score, maps)
    return [
        (values.detach().float() * gradient.float()).clamp(min=0).sum(dim=1)
        for values, gradient in zip(maps, gradients, strict=True)
    ]


def gradient_saliency(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """Return the largest gradient of the class logit over the channels (Simonyan et al. 2014)."""
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
