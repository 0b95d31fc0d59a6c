import numpy as np
import pytest
import torch

from model.masking import (
    bernoulli_straight_through,
    gumbel_difference,
    normalize,
    paint,
    pixel_segments,
    superpixel_mean,
)


@pytest.mark.parametrize("count", [1, 7, 40])
def test_superpixel_mean_equals_a_loop_over_labels(count: int) -> None:
    rng = np.random.default_rng(count)
    values, segments = rng.random((3, 8, 6)), rng.integers(0, count, (3, 8, 6))
    result = superpixel_mean(torch.tensor(values), torch.tensor(segments), count).numpy()
    for image in range(3):
        for label in range(count):
            inside = segments[image] == label
            expected = values[image][inside].mean() if inside.any() else 0.0
            assert result[image, label] == pytest.approx(expected, abs=1e-12)


def test_gradient_of_a_superpixels_mean_spreads_evenly_over_its_pixels() -> None:
    values = torch.zeros(1, 2, 3, requires_grad=True)
    segments = torch.tensor([[[0, 0, 1], [0, 1, 1]]])
    superpixel_mean(values, segments, 2)[0, 1].backward()
    assert values.grad is not None
    expected = torch.tensor([[[0, 0, 1], [0, 1, 1]]]) / 3
    torch.testing.assert_close(values.grad, expected)


def test_gumbel_difference_is_standard_logistic() -> None:
    noise = gumbel_difference((200_000,), torch.Generator().manual_seed(0)).double().numpy()
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.var() == pytest.approx(np.pi**2 / 3, rel=0.02)
    for point in (-3.0, -1.0, 0.5, 2.0):
        assert (noise < point).mean() == pytest.approx(1 / (1 + np.exp(-point)), abs=0.004)


@pytest.mark.parametrize("p", [0.02, 0.27, 0.5, 0.9])
def test_samples_are_exactly_bernoulli(p: float) -> None:
    """The comparison as printed in the paper would turn p = .02 into about .28."""
    noise = gumbel_difference((100_000,), torch.Generator().manual_seed(1))
    samples = bernoulli_straight_through(torch.full((100_000,), p), noise).numpy()
    assert set(np.unique(samples.round(6))) == {0.0, 1.0}
    assert samples.mean() == pytest.approx(p, abs=4 * np.sqrt(p * (1 - p) / 100_000))


def test_certain_probabilities_give_certain_samples_and_finite_gradients() -> None:
    probability = torch.tensor([0.0, 1.0], requires_grad=True)
    noise = torch.tensor([30.0, -30.0])
    samples = bernoulli_straight_through(probability, noise)
    assert samples.tolist() == [0.0, 1.0]
    samples.sum().backward()
    assert probability.grad is not None
    assert probability.grad.tolist() == [1.0, 1.0]


def test_straight_through_passes_the_gradient_as_if_the_sample_were_p() -> None:
    probability = torch.rand(50, requires_grad=True)
    noise = gumbel_difference((50,), torch.Generator().manual_seed(2))
    weights = torch.randn(50)
    (bernoulli_straight_through(probability, noise) * weights).sum().backward()
    assert probability.grad is not None
    torch.testing.assert_close(probability.grad, weights)


def test_without_superpixels_each_pixel_keeps_its_own_probability() -> None:
    values = torch.rand(2, 4, 6)
    segments = pixel_segments(torch.zeros(2, 4, 6, dtype=torch.int64))
    means = superpixel_mean(values, segments, 24)
    assert torch.equal(means, values.flatten(1))
    assert torch.equal(paint(means, segments), values)


def test_normalizing_the_mean_colour_gives_the_value_of_a_masked_pixel() -> None:
    images = torch.tensor([100, 150, 200], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    mean, std = torch.tensor([100.0, 150.0, 200.0]), torch.tensor([50.0, 75.0, 100.0])
    assert normalize(images, mean, std).abs().max() == 0
    assert normalize(images, torch.zeros(3), std).unique().tolist() == [2.0]
