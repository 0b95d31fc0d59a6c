"""The localizer that comes with the project, and the command that writes it."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.locate import locate, prepare
from jobs.pictures import encode_png
from jobs.runs import MODEL_NAME, RUN_NAME, Nets, colour_statistics, save_nets
from jobs.shipped import SHIPPED, load_shipped, main
from model.decoder import object_map, resize
from model.masking import normalize
from pipeline.errors import UserError
from pipeline.synthetic import SyntheticConfig, draw_image

pytest.importorskip("efficientnet_lite_pytorch", reason="pip install '.[photos]'")
WEIGHTS = SHIPPED.with_suffix(".safetensors")


@pytest.fixture(scope="module")
def shipped() -> Nets:
    return load_shipped()


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the shipped files, to be damaged."""
    for path in (SHIPPED, WEIGHTS):
        shutil.copy(path, tmp_path)
    return tmp_path / SHIPPED.name


def test_the_shipped_net_sees_320_pixels_and_names_one_of_1000_classes(shipped: Nets) -> None:
    drawing, config = SyntheticConfig(min_side=400, max_side=400), shipped.config
    image = prepare(config, encode_png(draw_image(drawing, "val", 0)[0]))
    (result,) = locate(shipped, [image], batch_size=1)
    assert (image.pixels.shape, result.map.shape) == ((320, 320, 3), (224, 224))
    x = torch.from_numpy(image.pixels).permute(2, 0, 1)[None]
    x = normalize(x, *colour_statistics(config, x.device))
    with torch.no_grad():
        maps = object_map(shipped.corruption, x, torch.empty(0), 0)
        scores = torch.softmax(shipped.clean_classifier(resize(x, (224, 224))), dim=1)[0]
    expected = resize(maps[:, None], (224, 224))[0, 0].numpy()
    np.testing.assert_allclose(result.map, expected, atol=0.05)  # of bfloat16
    best = int(scores.argmax())
    assert result.top5[0][0] == config.classes[best]
    assert result.top5[0][2] == pytest.approx(float(scores[best]), abs=0.05)
    assert len(result.top5) == 5
    assert len(set(config.classes)) == len(config.class_names) == 1000


def test_a_run_is_shipped_without_its_network_and_paths(
    shipped: Nets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = tmp_path / "run", tmp_path / "shipped"
    record = {"configuration": {"nets": {"rule": "otsu", "weights": "/a/file"}}, "commit": "c"}
    run.mkdir()
    save_nets(run, shipped, record)
    (run / RUN_NAME).write_text(json.dumps({"data_sha256": "d"}))
    main(["--run", str(run), "--images", "photographs", "--output", str(output)])
    assert (output / WEIGHTS.name).read_bytes() == WEIGHTS.read_bytes()
    written = json.loads((output / SHIPPED.name).read_text())
    assert written["record"]["configuration"] == {"nets": {"rule": "otsu"}}
    assert written["config"] == json.loads(SHIPPED.read_text())["config"]
    assert (
        WEIGHTS.stat().st_size < (run / MODEL_NAME).with_suffix(".safetensors").stat().st_size / 10
    )


@pytest.mark.parametrize("name", [SHIPPED.name, WEIGHTS.name])
def test_a_changed_byte_of_the_shipped_files_is_noticed_by_their_hash(
    name: str, copied: Path
) -> None:
    path = copied.with_name(name)
    data = bytearray(path.read_bytes())
    position = data.index(b"0.99") if name == SHIPPED.name else len(data) // 2
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} .*SHA-256.*git checkout"):
        load_shipped(copied)


def test_without_its_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"pip install '\.\[photos\]'"):
        load_shipped()
