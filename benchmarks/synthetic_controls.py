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

SIZE = 64
BATCH = 64
WIDTH = 16
RATE = 2e-3


def draw_split(split: str, count: int, blanked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` images at 64 px, uint8 [count, 3, 64, 64], and their labels, int64."""
    images, labels = [], []
    for index in range(count):
        image, empty, label, _ = draw_image(SyntheticConfig(), split, index)
        chosen = empty if blanked else image
        images.append(cv2.resize(chosen, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
        labels.append(label)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.tensor(labels)


def learned_accuracy(blanked: bool, *, train_images: int, val_images: int, epochs: int) -> float:
    """Val accuracy of a classifier trained on images without (`blanked`) or with objects."""
    torch.manual_seed(0)
    images, labels = draw_split("train", train_images, blanked)
    val_pixels, val_labels = draw_split("val", val_images, blanked)
    colours = (torch.full((3,), 120.0), torch.full((3,), 60.0))
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
        answers = net(normalize(val_pixels, *colours)).argmax(dim=1)
    return float((answers == val_labels).float().mean())


def main() -> None:
    rows = []
    for name, blanked in (("with objects", False), ("objects blanked out", True)):
        accuracy = learned_accuracy(blanked, train_images=5000, val_images=1000, epochs=25)
        rows.append([name, f"{accuracy:.3f}"])
    rows.append(["chance", f"{1 / len(CLASS_NAMES):.3f}"])
    print(cli.table(["images", "val accuracy"], rows))


if __name__ == "__main__":
    cli.run(main)
