import hashlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import UserError
from pipeline.shards.plan import PreprocessConfig, make_plan
from pipeline.shards.shard import make_shard
from pipeline.sources import labels
from pipeline.sources.find import Source
from tests import remote
from tests.pipeline.sources.miniature import (
    FORMS,
    Box,
    Miniature,
    MiniImage,
    archives,
    folders,
    kaggle,
    read_source,
    tar,
    write,
    xml,
)


def drawn_image(
    seed: int, stem: str, wnid: str, boxes: tuple[Box, ...], scale: int = 1
) -> MiniImage:
    """A JPEG, every fourth one grey, whose boxes refer to `scale` times its size."""
    rng = np.random.default_rng(seed)
    width, height = (int(x) for x in rng.integers(40, 120, 2))
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((width, height))
    buffer = io.BytesIO()
    (coarse.convert("L") if seed % 4 == 0 else coarse).save(buffer, "JPEG", quality=90)
    size = (scale * width, scale * height)
    return MiniImage(stem=stem, wnid=wnid, data=buffer.getvalue(), boxes=boxes, size=size)


def drawn_miniature() -> Miniature:
    wnids = ["n01751748", "n00000017", "n00000005"] * 8
    train, val = [], []
    for i, wnid in enumerate(wnids):
        boxes = ((i % 5, 1, 30, 35), (2, 2, 39, 39))[: i % 3]
        train.append(drawn_image(i, f"{wnid}_{i * 7}", wnid, boxes, scale=2 if i % 6 == 1 else 1))
    for i, wnid in enumerate(wnids[:10]):
        stem = labels.VAL_ID.format(i + 1)
        val.append(drawn_image(100 + i, stem, wnid, ((i, 2, 35, 38),)))
    return Miniature(train=tuple(train), val=tuple(val))


def real_miniature(samples: Path) -> Miniature:
    """120 ImageNet images as train, each fifth again as val; val image 1 is a sea snake."""
    train = []
    for i, path in enumerate(sorted(samples.glob("*.JPEG"))):
        with Image.open(path) as image:
            size = image.size
        boxes = ((size[0] // 5, size[1] // 4, size[0] * 3 // 4, size[1] - 3),) * (i % 3)
        wnid, data = path.name.split("_")[0], path.read_bytes()
        train.append(MiniImage(stem=path.stem, wnid=wnid, data=data, boxes=boxes, size=size))
    first = next(x for x in train if x.wnid == labels.PROBE_WNID)
    chosen = [first, *(x for x in train[::5] if x is not first)]
    val = [
        replace(x, stem=labels.VAL_ID.format(i), boxes=((1, 2, 30, 40),))
        for i, x in enumerate(chosen, 1)
    ]
    return Miniature(train=tuple(train), val=tuple(val))


def shards(source: str, output: Path, size: int | str = 32) -> tuple[dict[str, str], Source]:
    """SHA-256 of each shard and index, made without Ray, and what was listing."""
    config = PreprocessConfig(
        source=source, output=str(output), image_size=size, superpixels=50, samples_per_shard=16
    )
    plan = make_plan(config)
    for task in plan.tasks:
        facts = make_shard(task, plan.images(task), plan.source, plan.output, config)
        assert facts.images == task.rows
    files = sorted(x for x in output.rglob("*") if x.suffix in (".tar", ".idx"))
    return {x.name: hashlib.sha256(x.read_bytes()).hexdigest() for x in files}, plan.collection


@pytest.mark.parametrize("images", ["drawn", "real"])
def test_each_form_of_ilsvrc_gives_the_same_shards(
    images: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if images == "drawn":
        mini = drawn_miniature()
    else:
        mini = real_miniature(request.getfixturevalue("imagenet_samples"))
    reference: dict[str, str] = {}
    for name, form in FORMS.items():
        source = write(tmp_path / name / "source", form(mini))
        hashes, listing = shards(str(source), tmp_path / name / "shards")
        assert (listing.layout, listing.classes) == ("ilsvrc", tuple(mini.wnids)), name
        counts = [table.num_rows for table in listing.images.values()]
        assert counts == [len(mini.train), len(mini.val)]
        assert len(hashes) == 2 * sum(-(-count // 16) for count in counts)
        reference = reference or hashes
        assert hashes == reference, name


@pytest.mark.parametrize("form", ["archives", "folders", "kaggle"])
def test_ilsvrc_on_object_storage_gives_the_same_shards(
    form: str, tmp_path: Path, s3_endpoint: str
) -> None:
    mini = drawn_miniature()
    source = write(tmp_path / "source", FORMS[form](mini))
    uri = remote.upload(source, s3_endpoint, f"ilsvrc-{form}")
    local, _ = shards(str(source), tmp_path / "local")
    far, listing = shards(uri, tmp_path / "far")
    assert far == local
    assert listing.layout == "ilsvrc"


def test_labels_that_disagree_are_refused_with_the_first_image(tmp_path: Path) -> None:
    mini = drawn_miniature()
    wrong = archives(mini)
    order = mini.wnids  # the trap: the devkit's numbers taken for positions in the sorted wnids
    numbers = mini.lines(lambda x: str(order.index(x.wnid) + 1))
    inner = {"data/ILSVRC2012_validation_ground_truth.txt": numbers, "data/meta.mat": mini.meta()}
    wrong["ILSVRC2012_devkit_t12.tar.gz"] = tar(inner, "w:gz")
    message = (
        r"labels disagree on \d images, the first: ILSVRC2012_val_00000001 is n01751748 in the "
        r"XML, n00000005 in ILSVRC2012_devkit_t12.tar.gz/data/ILSVRC2012_validation_"
    )
    with pytest.raises(UserError, match=message):
        read_source(write(tmp_path, wrong))


@pytest.mark.parametrize(
    ("labels_file", "wnid"),
    [
        ({"imagenet_2012_validation_synset_labels.txt": b"n00000005\n"}, "n00000005"),
        ({"caffe_ilsvrc12/val.txt": b"ILSVRC2012_val_00000001.JPEG 1\n"}, "n00000017"),
        (
            {"LOC_val_solution.csv": b'ILSVRC2012_val_00000001,"n00000005 1 2 3 4 "\r\n'},
            "n00000005",
        ),
        ({"val/ILSVRC2012_val_00000001.xml": drawn_miniature().val[1].xml}, "n00000017"),
    ],
)
def test_each_file_of_labels_suffices_alone(
    labels_file: dict[str, bytes], wnid: str, tmp_path: Path
) -> None:
    mini = drawn_miniature()
    images = {x: y for x, y in folders(mini).items() if x.startswith(("train", "val"))}
    source = read_source(write(tmp_path, images | labels_file))
    first, second = source.images["val"].slice(0, 2).to_pylist()
    assert (first["wnid"], first["label"]) == (wnid, mini.wnids.index(wnid))
    assert (second["wnid"], second["label"]) == (None, None)
    assert second["problem"].startswith("label unknown: ")


def test_kaggles_running_numbers_are_never_labels(tmp_path: Path) -> None:
    mini = drawn_miniature()
    files = kaggle(mini)
    for name in [x for x in files if x.endswith(".xml") or x == "LOC_val_solution.csv"]:
        del files[name]
    source = read_source(write(tmp_path, files))
    assert source.images["val"]["wnid"].null_count == len(mini.val)
    assert source.images["train"]["boxes"].to_pylist() != [[]] * len(mini.train)  # of the solution


def thousand(number: int) -> list[str]:
    """Return 1000 wnids, of which n01751748 has this number, from 1."""
    wnids = [f"n{i:08d}" for i in range(2_000_000, 2_000_999)]
    return [*wnids[: number - 1], labels.PROBE_WNID, *wnids[number - 1 :]]


def test_val_image_1_tells_the_order_of_the_labels() -> None:
    devkit = b"490\n" + b"1\n" * 49_999
    right = labels.read_devkit_labels(devkit, "truth.txt", thousand(490))
    assert right[labels.PROBE_ID] == labels.PROBE_WNID
    assert len(right) == labels.VAL_IMAGES
    for numbers, wnids in ((b"65\n", thousand(490)), (b"490\n", thousand(66))):
        with pytest.raises(UserError, match=r"val image 1 .* n01751748 .490 in the devkit"):
            labels.read_devkit_labels(numbers + b"1\n" * 49_999, "truth.txt", wnids)
    caffe = b"".join(b"ILSVRC2012_val_%08d.JPEG 65\n" % i for i in range(1, 50_001))
    right = labels.read_caffe_labels(caffe, "val.txt", thousand(66))
    assert right[labels.PROBE_ID] == labels.PROBE_WNID
    with pytest.raises(UserError, match="numbers 1000 classes, and 100 are known"):
        labels.read_caffe_labels(caffe, "val.txt", thousand(66)[:100])
    synsets = b"n02000000\n" * 50_000
    with pytest.raises(UserError, match="val image 1 the class n02000000"):
        labels.read_synset_labels(synsets, "synsets.txt")


def test_devkit_labels_without_their_classes_are_refused(tmp_path: Path) -> None:
    files = folders(drawn_miniature())
    files["ILSVRC2012_validation_ground_truth.txt"] = b"1\n"
    with pytest.raises(UserError, match=r"put the devkit.s meta\.mat beside it"):
        read_source(write(tmp_path, files))


def refusal(root: Path) -> str | None:
    try:
        read_source(root)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
def test_an_image_archive_that_is_cut_off_anywhere_is_refused(name: str, tmp_path: Path) -> None:
    whole = archives(drawn_miniature())
    end = len(whole[name].rstrip(b"\0"))
    for length in range(0, end, 511):
        root = write(tmp_path, whole | {name: whole[name][:length]})
        message = refusal(root)
        assert message is not None, length
        assert f"{name} " in message
        assert message.endswith("copy it again.")


def named_alike(*names: str) -> dict[str, bytes]:
    """Images of equal names in two class folders of each split, and XML under these names."""
    wnids = ("n00000005", "n00000017")
    folders = [f"{split}/{wnid}" for split in ("train", "val") for wnid in wnids]
    images = {f"{folder}/art_{i}.jpg": b"" for folder in folders for i in range(2)}
    boxes = {name: xml(name.split("/")[-2], (i, 1, 20, 30)) for i, name in enumerate(names, 1)}
    return images | {name: text.encode() for name, text in boxes.items()}


def test_images_of_one_name_are_told_apart_by_split_and_class_folder(tmp_path: Path) -> None:
    names = ("train/n00000005/art_0.xml", "train/n00000017/art_1.xml", "val/n00000005/art_0.xml")
    source = read_source(write(tmp_path, named_alike(*(f"boxes/{x}" for x in names))))
    rows = [row for table in source.images.values() for row in table.to_pylist()]
    assert [row["label"] for row in rows] == [int("17/" in row["path"]) for row in rows]
    boxed = {row["path"]: row["boxes"][0][0] for row in rows if row["boxes"]}
    assert boxed == {f"{name[:-4]}.jpg": i for i, name in enumerate(names, 1)}


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (
            {
                f"{i}/{wnid}/art_0.xml": xml(wnid, (i, 2, 30, 40)).encode()
                for i, wnid in enumerate(("n00000005", "n00000017", "n00000005"))
            },
            "0/n00000005/art_0.xml and 2/n00000005/art_0.xml describe the image art_0 differently",
        ),
        ({"boxes/n1/art_0.xml": xml("n00000005", (1, 2, 3, 4)).encode()}, r"n1/art_0\.xml .* 2 im"),
        (
            {"caffe/val.txt": b"ILSVRC2012_val_00000001.JPEG 0\nILSVRC2012_val_00000001.JPEG 1"},
            "two nu",
        ),
        ({"LOC_val_solution.csv": b"art_0,n00000005 1 2 3 4\n"}, r"LOC_val_solution\.csv .* 2 im"),
        (
            {f"val/{wnid}/ILSVRC2012_val_00000001.JPEG": b"" for wnid in ("n00000005", "n00000017")}
            | {"imagenet_2012_validation_synset_labels.txt": b"n00000005\n"},
            "synset_labels.txt labels ILSVRC2012_val_00000001, an image in val/n00000005/",
        ),
        (
            {"a/n00000005/v.xml": xml("n00000005", (1, 2, 3, 4)).encode()}
            | {"a/n00000017/v.xml": xml("n00000017", (1, 2, 3, 4)).encode(), "val/v.jpg": b""},
            "a/n00000005/v.xml and a/n00000017/v.xml describe the image v differently",
        ),
    ],
)
def test_a_name_that_several_images_share_is_refused(
    added: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_source(write(tmp_path, named_alike() | added))


def test_a_class_folder_s_xml_is_never_another_class_s(tmp_path: Path) -> None:
    files = named_alike("boxes/n00000005/art_9.xml") | {"train/n00000017/art_9.jpg": b""}
    source = read_source(write(tmp_path, files))
    assert not any(source.images["train"]["boxes"].to_pylist())


def test_one_published_archive_is_a_source(tmp_path: Path) -> None:
    mini = drawn_miniature()
    source = read_source(write(tmp_path, archives(mini)) / "ILSVRC2012_img_train.tar")
    assert (source.layout, source.classes) == ("ilsvrc", tuple(mini.wnids))
    assert {split: table.num_rows for split, table in source.images.items()} == {"train": 24}


def test_a_class_that_is_both_a_tar_and_a_folder_is_refused(tmp_path: Path) -> None:
    files = named_alike() | {"train/n00000005.tar": tar({"n00000005_1.JPEG": b""})}
    with pytest.raises(UserError, match=r"train/n00000005 and .*n00000005\.tar hold the same"):
        read_source(write(tmp_path, files))


LISTS = {
    "LOC_synset_mapping.txt": b"n00000005 ant\nn00000017 bee, wasp\n",
    "words.txt": b"n00000005\tant\nn00000017\tbee\n",
    "imagenet_2012_validation_synset_labels.txt": b"n00000005\nn00000017\n",
    "val.txt": b"ILSVRC2012_val_00000001.JPEG 0\nILSVRC2012_val_00000002.JPEG 1\n",
    "devkit/ILSVRC2012_validation_ground_truth.txt": b"3\n2\n",
    "devkit/meta.mat": drawn_miniature().meta(),
    "LOC_val_solution.csv": "".join(
        f"{labels.VAL_ID.format(i)},{wnid} 1 2 3 4 \n"
        for i, wnid in enumerate(("n00000005", "n00000017"), 1)
    ).encode(),
}


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from([*LISTS]), data=st.data())
def test_any_change_to_a_list_is_a_listing_or_one_clear_error(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    files = {f"val/{labels.VAL_ID.format(i)}.JPEG": b"" for i in (1, 2)} | LISTS
    files |= {f"train/{wnid}/{wnid}_1.JPEG": b"" for wnid in ("n00000005", "n00000017")}
    old, start = files[name], data.draw(st.integers(0, len(files[name])))
    inserted = data.draw(st.binary(max_size=9) | st.sampled_from([old, b"-1\n", b"9" * 5000]))
    files[name] = old[:start] + inserted + old[data.draw(st.integers(start, len(old))) :]
    try:
        source = read_source(write(tmp_path_factory.mktemp("lists"), files))
    except UserError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    else:
        assert [table.num_rows for table in source.images.values()] == [2, 2]
