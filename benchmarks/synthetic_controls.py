"""Does anything but the objects tell the class in the generated set?

`python -m benchmarks.synthetic_controls` trains the classifier twice, on the images and on the
same images without their objects, and prints both accuracies on val beside chance.
"""

import cv2
import numpy as np
import torch

from jobs import cli
from model.classifier import Classifier
from model.masking import normalize
from model.step import clean_step
from pipeline.synthetic import CLASS_NAMES, SyntheticConfig, draw_image

BATCH = 64
WIDTH = 16
RATE = 2e-3


def draw_split(split: str, count: int, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the first `count` images with objects and without: uint8 [2, count, 3, side, side].
    Returns them and their labels, int64 [count]."""
    pictures, labels = np.empty((2, count, side, side, 3), np.uint8), []
    for index in range(count):
        *both, label, _ = draw_image(SyntheticConfig(), split, index)
        for kind, image in enumerate(both):
            pictures[kind, index] = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        labels.append(label)
    return torch.from_numpy(pictures).permute(0, 1, 4, 2, 3), torch.tensor(labels)


def learned_accuracies(
    *, train_images: int, val_images: int, epochs: int, side: int = 64
) -> list[float]:
    """Return the val accuracy of a classifier trained on images with objects, and without."""
    pictures, labels = draw_split("train", train_images, side)
    val_pictures, val_labels = draw_split("val", val_images, side)
    colours = (torch.full((3,), 120.0), torch.full((3,), 60.0))
    accuracies = []
    for images, shown in zip(pictures, val_pictures, strict=True):
        torch.manual_seed(0)
        net = Classifier(len(CLASS_NAMES), WIDTH)
        optimizer = torch.optim.Adam(net.parameters(), RATE)
        for _ in range(epochs):
            for part in torch.randperm(len(labels)).split(BATCH):
                batch = normalize(images[part], *colours)
                gradients = clean_step(net, batch, labels[part], len(part)).classifier_gradients
                for parameter, gradient in zip(net.parameters(), gradients or (), strict=True):
                    parameter.grad = gradient
                optimizer.step()
        with torch.no_grad():
            answers = net(normalize(shown, *colours)).argmax(dim=1)
        accuracies.append(float((answers == val_labels).float().mean()))
    return accuracies


def main() -> None:
    accuracies = learned_accuracies(train_images=5000, val_images=1000, epochs=25)
    names = ("with objects", "objects blanked out", "chance")
    values = (*accuracies, 1 / len(CLASS_NAMES))
    rows = [[name, f"{value:.3f}"] for name, value in zip(names, values, strict=True)]
    print(cli.table(["images", "val accuracy"], rows))


if __name__ == "__main__":
    cli.run(main)
