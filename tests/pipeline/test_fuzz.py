"""Damaged files of every kind: none ends the process, and each that is refused says why."""

import io
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.shards.ledger import read_record
from pipeline.shards.plan import PreprocessConfig, make_plan
from pipeline.shards.shard import make_shard
from pipeline.sources.annotations import MAX_WNID, read_annotation
from tests.pipeline.sources.miniature import write, xml

IMAGES = 5_000
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF")
SIGNS = (b'"', b"'", b"<", b"&", b",", b"\r")
REASON = re.compile(r"[a-z][A-Za-z ]+: .+", re.DOTALL)
EXTREMES = (*b"0 -1 999999999999 1e308 inf nan \0 \xff".split(), b"9" * 5000, b"")


def originals() -> list[bytes]:
    """Small images of each format and of several modes."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((48, 40))
    images = []
    for form in FORMATS:
        for mode in ("RGB", "L", "P", "RGBA", "CMYK", "1"):
            buffer = io.BytesIO()
            options = {"progressive": True} if form == "JPEG" and mode == "L" else {}
            try:
                coarse.convert(mode).save(buffer, form, **options)
            except (OSError, ValueError):  # the format lacks the mode
                continue
            images.append(buffer.getvalue())
    return images


def mutated(data: bytes, others: list[bytes], draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(changed) + 1)
        match draw.randrange(6):
            case 0:  # flip bits
                for _ in range(draw.randint(1, 8)):
                    if changed:
                        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
            case 1:  # cut off
                del changed[start:]
            case 2:  # another file's header
                header = draw.choice(others)[: draw.choice((2, 4, 12, 30, 100))]
                changed[: len(header)] = header
            case 3:  # overwrite
                changed[start : start + 8] = draw.randbytes(8)
            case 4:  # repeat a piece
                changed[start:start] = changed[start : start + draw.randint(1, 50)]
            case _:  # take a piece out
                del changed[start : start + draw.randint(1, 50)]
    return bytes(changed)


def test_every_mutated_image_is_stored_or_rejected_with_its_reason(tmp_path: Path) -> None:
    whole, draw = originals(), random.Random(0)
    for number in range(IMAGES):
        data = mutated(whole[number % len(whole)], whole, draw)
        write(tmp_path / "source", {f"class/{number:05}.png": data})
    config = PreprocessConfig(
        source=str(tmp_path / "source"),
        output=str(tmp_path / "out"),
        image_size="32x40",
        superpixels=16,
        samples_per_shard=1000,
    )
    plan = make_plan(config)
    rows = []
    for task in plan.tasks:
        make_shard(task, plan.images(task), plan.source, plan.output, config)
        rows += read_record(task.record(plan.output)).to_pylist()
    assert sorted(row["id"] for row in rows) == [f"class/{i:05}.png" for i in range(IMAGES)]
    rejected = [row["reason"] for row in rows if row["status"] == "rejected"]
    assert IMAGES // 4 < len(rejected) < IMAGES
    assert all(map(REASON.fullmatch, rejected))
    kinds = {reason.split(":")[0] for reason in rejected}
    assert kinds >= {"damaged JPEG", "cannot be decoded", "no image format"}
    assert len(kinds) < 12


def mutated_text(data: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(data) + 1)
        match draw.randrange(6):
            case 0:
                data = data[:start] + bytes([draw.randrange(256)]) + data[start + 1 :]
            case 1:
                data = data[:start]
            case 2:
                data = re.sub(
                    rb"\d+", lambda _: draw.choice(EXTREMES), data, count=draw.randint(1, 9)
                )
            case 3:
                data = data[:start] + draw.choice(SIGNS) + data[start:]
            case 4:
                data = data.decode("latin-1").encode(draw.choice(("utf-16", "utf-7", "cp500")))
            case _:
                data = data + data[start:]
    return data


def test_no_annotation_raises_and_what_it_gives_fits_the_columns() -> None:
    draw = random.Random(1)
    original = xml("n00000001", (1, 2, 30, 40), (5, 6, 7, 8)).encode()
    noted = 0
    for _ in range(3000):
        annotation = read_annotation(mutated_text(original, draw))
        noted += annotation.note is not None
        assert all(len(box) == 4 and max(map(abs, box)) < 2**31 for box in annotation.boxes)
        assert annotation.wnid is None or 0 < len(annotation.wnid) <= MAX_WNID
        assert annotation.note is None or len(annotation.note) < 500
    assert 300 < noted < 3000


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))


@pytest.mark.parametrize(
    "text",
    [
        f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><annotation><folder>&l11;</folder></annotation>',
        '<!DOCTYPE a SYSTEM "http://127.0.0.1:9/x.dtd"><annotation/>',
        '<!DOCTYPE a [<!ENTITY % p SYSTEM "file:///etc/passwd"> %p;]><annotation/>',
        "<a>" * 200_000,
        "<annotation>" + "<a>" * 100_000 + "</a>" * 100_000 + "</annotation>",
        f"<annotation><object><name>{'n' * 10**6}</name></object></annotation>",
        f"<annotation>{'<object/>' * 10**5}</annotation>",
        "<annotation><object>",
        "",
        '<?xml version="1.0" encoding="nonsense"?><annotation/>',
    ],
)
def test_hostile_annotations_cost_nothing_and_tell_nothing(text: str) -> None:
    annotation = read_annotation(text.encode())
    assert (annotation.wnid, annotation.boxes) == (None, ())
    sound = text.endswith("</annotation>") and "DOCTYPE" not in text
    assert (annotation.note is None) == sound
