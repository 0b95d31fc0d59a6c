"""A miniature of ILSVRC 2012 in each form in which it lies on disks."""

import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io

from pipeline.sources.files import SourceFiles
from pipeline.sources.find import Source, find_layout, list_images
from pipeline.synthetic import annotation_xml

SYNSET = [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "num_children")]
Box = tuple[int, int, int, int]


def xml(wnid: str, *boxes: Box, size: tuple[int, int] | None = (500, 375)) -> str:
    """Return an annotation whose file name is wrong, as many are; size: (width, height)."""
    return annotation_xml("misleading", wnid, boxes, size)


@dataclass(frozen=True, kw_only=True)
class MiniImage:
    """stem: as ILSVRC names it. boxes: in pixels of an image of `size` (width, height)."""

    stem: str
    wnid: str
    data: bytes
    boxes: tuple[Box, ...]
    size: tuple[int, int]

    @property
    def xml(self) -> bytes:
        return xml(self.wnid, *self.boxes, size=self.size).encode()


@dataclass(frozen=True, kw_only=True)
class Miniature:
    train: tuple[MiniImage, ...]
    val: tuple[MiniImage, ...]

    @property
    def wnids(self) -> list[str]:
        return sorted({image.wnid for image in self.train})

    @property
    def devkit_order(self) -> list[str]:
        return self.wnids[::-1]

    def lines(self, text: Callable[[MiniImage], str]) -> bytes:
        """A line per val image, in order."""
        return "".join(f"{text(image)}\n" for image in self.val).encode()

    def devkit_labels(self) -> bytes:
        return self.lines(lambda image: str(self.devkit_order.index(image.wnid) + 1))

    def meta(self) -> bytes:
        inner = ("n00000000", len(self.wnids) + 1, 2)
        leaves = [(wnid, number, 0) for number, wnid in enumerate(self.devkit_order, 1)]
        table = np.empty((len(leaves) + 1, 1), SYNSET)
        for row, (wnid, number, children) in zip(table[:, 0], [*leaves, inner], strict=True):
            row["ILSVRC2012_ID"], row["WNID"] = float(number), wnid
            row["words"], row["num_children"] = f"name of {wnid}", float(children)
        buffer = io.BytesIO()
        scipy.io.savemat(buffer, {"synsets": table})
        return buffer.getvalue()


def tar(members: dict[str, bytes], mode: str = "w", form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=form) as file:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def read_source(root: Path, layout: str | None = None) -> Source:
    """List a folder by the layout that is found in it, or by the one given."""
    with SourceFiles(str(root)) as files:
        return list_images(files, layout or find_layout(files))


def class_tars(mini: Miniature) -> dict[str, bytes]:
    return {
        f"{wnid}.tar": tar({f"{x.stem}.JPEG": x.data for x in mini.train if x.wnid == wnid})
        for wnid in mini.wnids[::-1]  # no form promises an order
    }


def val_tar(mini: Miniature) -> bytes:
    return tar({f"{x.stem}.JPEG": x.data for x in mini.val[::-1]}, form=tarfile.GNU_FORMAT)


def train_folders(mini: Miniature) -> dict[str, bytes]:
    return {f"{x.wnid}/{x.stem}.JPEG": x.data for x in mini.train}


def box_archives(mini: Miniature) -> dict[str, bytes]:
    train = {f"{x.wnid}/{x.stem}.xml": x.xml for x in mini.train if x.boxes}
    val = {f"val/{x.stem}.xml": x.xml for x in mini.val}
    return {
        "ILSVRC2012_bbox_train_v2.tar.gz": tar(train, "w:gz"),
        "ILSVRC2012_bbox_val_v3.tgz": tar(val, "w:gz"),
    }


def loose_boxes(mini: Miniature, root: str) -> dict[str, bytes]:
    train = {f"{root}/train/{x.wnid}/{x.stem}.xml": x.xml for x in mini.train if x.boxes}
    return train | {f"{root}/val/{x.stem}.xml": x.xml for x in mini.val}


def archives(mini: Miniature) -> dict[str, bytes]:
    data = "ILSVRC2012_devkit_t12/data"
    devkit = {
        f"{data}/ILSVRC2012_validation_ground_truth.txt": mini.devkit_labels(),
        f"{data}/meta.mat": mini.meta(),
    }
    return {
        "ILSVRC2012_img_train.tar": tar(class_tars(mini)),
        "ILSVRC2012_img_val.tar": val_tar(mini),
        "ILSVRC2012_devkit_t12.tar.gz": tar(devkit, "w:gz", tarfile.PAX_FORMAT),
    } | box_archives(mini)


def folders(mini: Miniature) -> dict[str, bytes]:
    return (
        {f"train/{name}": data for name, data in train_folders(mini).items()}
        | {f"val/{x.stem}.JPEG": x.data for x in mini.val}
        | loose_boxes(mini, "boxes")
        | {"imagenet_2012_validation_synset_labels.txt": mini.lines(lambda x: x.wnid)}
    )


def val_in_classes(mini: Miniature) -> dict[str, bytes]:
    flat = folders(mini)
    moved = {f"val/{x.wnid}/{x.stem}.JPEG": flat.pop(f"val/{x.stem}.JPEG") for x in mini.val}
    return flat | moved


def kaggle(mini: Miniature) -> dict[str, bytes]:
    def solution(images: tuple[MiniImage, ...]) -> bytes:
        rows = ["ImageId,PredictionString\n"]
        for x in filter(lambda x: x.boxes, images[::-1]):
            boxes = "".join(f"{x.wnid} {' '.join(map(str, box))} " for box in x.boxes)
            rows.append(f"{x.stem},{boxes}\n")
        return "".join(rows).encode()

    data, sets = "ILSVRC/Data/CLS-LOC", "ILSVRC/ImageSets/CLS-LOC"
    return (
        {f"{data}/train/{name}": content for name, content in train_folders(mini).items()}
        | {f"{data}/val/{x.stem}.JPEG": x.data for x in mini.val}
        | {f"{data}/test/ILSVRC2012_test_00000001.JPEG": mini.val[0].data}
        | loose_boxes(mini, "ILSVRC/Annotations/CLS-LOC")
        | {
            f"{sets}/val.txt": mini.lines(lambda x: f"{x.stem} {mini.val.index(x) + 1}"),
            "LOC_synset_mapping.txt": "".join(f"{x} name of {x}\n" for x in mini.wnids).encode(),
            "LOC_train_solution.csv": solution(mini.train),
            "LOC_val_solution.csv": solution(mini.val),
        }
    )


def mixture(mini: Miniature) -> dict[str, bytes]:
    """The outer tar unpacked, the val tar not, boxes of both, labels from caffe and the devkit."""
    return (
        {f"train/{name}": data for name, data in class_tars(mini).items()}
        | box_archives(mini)
        | {
            "ILSVRC2012_img_val.tar": val_tar(mini),
            "caffe/val.txt": mini.lines(lambda x: f"{x.stem}.JPEG {mini.wnids.index(x.wnid)}"),
            "devkit/data/ILSVRC2012_validation_ground_truth.txt": mini.devkit_labels(),
            "devkit/data/meta.mat": mini.meta(),
        }
    )


def hugging_face(mini: Miniature) -> dict[str, bytes]:
    """The archives of train unpacked, all in one folder; those of val in another."""
    train = {f"data/train_images_0/{x.stem}_{x.wnid}.JPEG": x.data for x in mini.train}
    return (
        train
        | {f"data/val_images/{x.stem}_{x.wnid}.JPEG": x.data for x in mini.val}
        | box_archives(mini)
    )


def flat(mini: Miniature) -> dict[str, bytes]:
    images = {f"{x.stem}_{x.wnid}.JPEG": x.data for x in (*mini.train, *mini.val)}
    return images | box_archives(mini)


def repacked(mini: Miniature) -> dict[str, bytes]:
    """Train in one tar with a folder for each class, val as published."""
    train = {f"./train/{name}": data for name, data in train_folders(mini).items()}
    return archives(mini) | {"ILSVRC2012_img_train.tar": tar(train)}


FORMS: dict[str, Callable[[Miniature], dict[str, bytes]]] = {
    "archives": archives,
    "folders": folders,
    "val in classes": val_in_classes,
    "kaggle": kaggle,
    "mixture": mixture,
    "hugging face": hugging_face,
    "flat": flat,
    "repacked": repacked,
}
