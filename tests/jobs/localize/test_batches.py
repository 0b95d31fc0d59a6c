"""Locating in batches, with random nets."""

import os
from dataclasses import astuple, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.localize.batches import Job, LocalizeConfig, process_batch
from jobs.locate import Located, Prepared, locate, prepare
from jobs.pictures import encode_png
from jobs.runs import Nets, colour_statistics, load_nets, save_nets
from model.localization import RULES, Rule, localize
from model.masking import mask_map, normalize
from pipeline.errors import UserError
from pipeline.evaluation.protocols import scale_boxes
from pipeline.shards.format import read_manifest
from pipeline.shards.images import read_image
from pipeline.shards.ledger import read_ledger
from tests.pipeline.made_set import stored_samples

SIZE = 32


@pytest.fixture
def nets(random_run: Path) -> Nets:
    torch.set_num_threads(1)  # as the job does
    return load_nets(random_run)


def random_images(nets: Nets, count: int) -> list[Prepared]:
    """Noise over a bright rectangle, each of another size."""
    rng = np.random.default_rng(0)
    images = []
    for i in range(count):
        pixels = rng.integers(0, 120, (40 + i, 90 - i, 3)).astype(np.uint8)
        pixels[10 : 15 + i, 20 : 30 + i] += 100
        images.append(prepare(nets.config, encode_png(pixels)))
    return images


def maps_of(results: list[Located]) -> np.ndarray:
    return np.stack([result.map for result in results])


@pytest.mark.parametrize("side", [40, 100])
def test_classifiers_over_a_network_see_no_pixels_that_were_enlarged(nets: Nets, side: int) -> None:
    config = replace(nets.config, network="any", sides=(nets.config.height, 80))
    data = encode_png(np.random.default_rng(0).integers(0, 255, (side, side, 3)).astype(np.uint8))
    image, size = prepare(config, data), (config.height, config.width)
    assert image.pixels.shape == (80, 80, 3)
    source = data if side < 80 else encode_png(image.pixels)
    np.testing.assert_array_equal(image.view, read_image(source, *size).pixels)


def test_an_image_is_located_as_from_its_shard(small_set: Path, nets: Nets) -> None:
    config, manifest = nets.config, read_manifest(small_set)
    paths = read_ledger(small_set, "val", ["path"])["path"].to_pylist()
    samples = stored_samples(small_set, "val")[:8]
    prepared = [
        prepare(config, (small_set.parent / "images" / path).read_bytes()) for path in paths[:8]
    ]
    results = locate(nets, prepared, batch_size=8)
    for sample, result, image in zip(samples, results, prepared, strict=True):
        x = torch.from_numpy(sample.image.copy()).permute(2, 0, 1)[None].contiguous()
        x = normalize(x, *colour_statistics(config, x.device))
        segments = torch.from_numpy(sample.segments.astype(np.int64))[None]
        with torch.no_grad():
            values = mask_map(nets.corruption, x, segments, manifest.max_superpixels).numpy()
            scores = torch.softmax(nets.clean_classifier(x), dim=1)[0].numpy()
        np.testing.assert_allclose(result.map, values[0], atol=1e-6)
        size = np.array([[sample.meta["height"], sample.meta["width"]]])
        assert (image.height, image.width) == tuple(size[0])
        box = scale_boxes(localize(values)[0], np.array((SIZE, SIZE)), size)
        assert [result.box] == box.tolist()
        best = np.argsort(-scores)[:5]
        assert [wnid for wnid, _, _ in result.top5] == [config.classes[c] for c in best]
        given = [score for *_, score in result.top5]
        assert given == pytest.approx(scores[best].tolist(), rel=1e-5)


def test_an_images_result_does_not_depend_on_its_batch_to_the_last_bit(nets: Nets) -> None:
    images = random_images(nets, 20)
    whole = locate(nets, images, batch_size=20)
    alone = [locate(nets, [image], batch_size=20)[0] for image in images]
    turned = locate(nets, images[::-1], batch_size=20)[::-1]
    for results in zip(whole, alone, turned, strict=True):
        maps, *others = zip(*map(astuple, results), strict=True)
        assert len({values.tobytes() for values in maps}) == 1
        assert all(values.count(values[0]) == 3 for values in others), "box, found, top5"


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batch_sizes_agree_to_rounding(nets: Nets, batch_size: int) -> None:
    images = random_images(nets, batch_size)
    results, expected = (locate(nets, images, batch_size=size) for size in (batch_size, 32))
    np.testing.assert_allclose(maps_of(results), maps_of(expected), atol=1e-6)
    assert [result.box for result in results] == [result.box for result in expected]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_the_cpu_finds(nets: Nets) -> None:
    images = random_images(nets, 20)
    expected = locate(nets, images, batch_size=32)
    for net in (nets.corruption, nets.clean_classifier):
        net.to("cuda")
    results = locate(nets, images, batch_size=32)
    np.testing.assert_allclose(maps_of(results), maps_of(expected), atol=5e-3)  # TF32


def test_each_rule_gives_its_own_box_of_the_same_map(nets: Nets) -> None:
    images = random_images(nets, 8)
    boxes = {}
    for rule in RULES:
        results = locate(nets, images, batch_size=8, rule=rule)
        sizes = np.array([(image.height, image.width) for image in images])
        of_maps = localize(maps_of(results), rule)[0]
        expected = scale_boxes(of_maps, np.array((SIZE, SIZE)), sizes)
        boxes[rule] = [result.box for result in results]
        assert boxes[rule] == expected.tolist()
    assert boxes["paper"] != boxes["mean"] != boxes["otsu"]


def test_a_flat_map_is_the_whole_image_and_not_found(nets: Nets) -> None:
    with torch.no_grad():
        nets.corruption.state_dict()["output.weight"].zero_()
    (result,) = locate(nets, random_images(nets, 1), batch_size=4)
    assert (result.box, result.found) == ([0, 0, 89, 39], False)


def test_every_kind_of_image_is_located_as_it_is_shown(
    random_run: Path, nets: Nets, tmp_path: Path
) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (48, 80, 3)).astype(np.uint8)
    picture, grey = Image.fromarray(colours), Image.fromarray(colours[..., 0])
    rotated = Image.Exif()
    rotated[274] = 6  # orientation: a viewer turns it back by 90 degrees
    kinds = {
        "plain.png": picture,
        "alpha.png": picture.convert("RGBA"),
        "turned.png": picture.transpose(Image.Transpose.ROTATE_90),
        "grey.png": grey,
        "grey16.png": Image.fromarray(colours[..., 0].astype(np.uint16) * 257),
        "palette.png": picture.convert("P"),
        "cmyk.tif": picture.convert("CMYK"),
        "pixel.png": picture.crop((0, 0, 1, 1)),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
    kinds["turned.png"].save(tmp_path / "turned.png", exif=rotated)
    paths = [tmp_path / name for name in kinds]
    paths.append(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff 'quoted' \xe7.png")))
    picture.save(os.fsencode(paths[-1]), "PNG")
    config = LocalizeConfig(
        images=(tmp_path,), run=random_run, output=tmp_path / "out", batch_size=16
    )
    jobs = [Job(path=p, overlay=f"{p.name}.png", mask=f"masks/{p.name}.png") for p in paths]
    entries = process_batch(nets, config, jobs)
    assert [entry["image"] for entry in entries] == [str(path) for path in paths]
    for entry in entries:
        size = (1, 1) if entry["image"].endswith("pixel.png") else (80, 48)
        assert (entry["status"], entry["width"], entry["height"]) == ("ok", *size)
        for kind, mode in (("overlay", "RGB"), ("mask", "L")):
            with Image.open(config.output / entry[kind]) as image:
                assert (image.size, image.mode) == (size, mode)
    results = {name: (e["box"], e["top5"]) for name, e in zip(kinds, entries, strict=False)}
    assert results["plain.png"] == results["alpha.png"]
    assert [entry["orientation"] for entry in entries[:3]] == [1, 1, 6]
    assert results["grey.png"] == results["grey16.png"]
    assert (entries[-1]["box"], entries[-1]["top5"]) == results["plain.png"]


def test_a_mask_of_an_image_of_the_nets_size_is_its_map(
    random_run: Path, nets: Nets, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3)).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(encode_png(pixels))
    config = LocalizeConfig(images=(), run=random_run, output=tmp_path / "out", overlays=False)
    job = Job(path=tmp_path / "a.png", overlay="a.png", mask="masks/a.png")
    (entry,) = process_batch(nets, config, [job])
    image = prepare(nets.config, encode_png(pixels))
    (result,) = locate(nets, [image], batch_size=config.batch_size)
    with Image.open(tmp_path / "out" / "masks" / "a.png") as mask:
        assert (np.asarray(mask) == np.rint(result.map * 255)).all()
    assert "overlay" not in entry
    assert not (tmp_path / "out" / "a.png").exists()


def test_a_batch_without_a_usable_image_gives_reasons_alone(
    random_run: Path, nets: Nets, tmp_path: Path
) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    names = ("empty.jpg", "folder.jpg", "none.jpg")
    config = LocalizeConfig(images=(), run=random_run, output=tmp_path / "out")
    jobs = [Job(path=tmp_path / n, overlay=f"{n}.png", mask=f"masks/{n}.png") for n in names]
    entries = process_batch(nets, config, jobs)
    assert [(entry["status"], entry["error"]) for entry in entries] == [
        ("failed", "empty file: it has 0 bytes"),
        ("failed", "not a regular file"),
        ("failed", "No such file or directory"),
    ]


def test_diverged_nets_end_the_job_with_the_remedy(nets: Nets, tmp_path: Path) -> None:
    with torch.no_grad():
        nets.corruption.state_dict()["output.weight"].fill_(torch.nan)
    save_nets(tmp_path, nets, {})
    with pytest.raises(UserError, match="train it again"):
        locate(load_nets(tmp_path), random_images(nets, 1), batch_size=2)


def test_every_rule_can_be_asked_for() -> None:
    assert get_args(Rule) == tuple(RULES)
