"""Photometric distortion: distribution of each factor, order of the changes, parity with a NumPy definition."""

from typing import Any

import numpy as np

from input_pipeline import transforms

PHOTOMETRIC: dict[str, Any] = {
    "brightness": 32.0,
    "contrast": (0.5, 1.5),
    "saturation": (0.5, 1.5),
    "hue": 18,
    "probability": 0.5,
}
UNCHANGED: dict[str, Any] = {"brightness": 0.0, "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": 0}


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def distorted(image: np.ndarray, number: int, **strengths: Any) -> np.ndarray:
    return transforms.photometric_distortion(image, (number, 3), **{**PHOTOMETRIC, **strengths})


def only(number: int, image: np.ndarray, **strengths: Any) -> np.ndarray:
    """Applies a single change with probability 1."""
    return distorted(image, number, **{**UNCHANGED, "probability": 1.0, **strengths})


def grey(value: int) -> np.ndarray:
    return np.full((1, 1, 3), value, np.uint8)


def test_brightness_is_added() -> None:
    amounts = np.array([int(only(n, grey(100), brightness=32.0)[0, 0, 0]) - 100 for n in range(600)])
    assert amounts.min() == -32 and amounts.max() == 31  # rounded down
    counts, _ = np.histogram(amounts, 4, (-32, 32))
    assert counts.min() > 105  # 150 expected, standard deviation 11
    for number in range(10):
        ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
        amount = amounts[number]
        expected = np.clip(np.arange(256) + amount, 0, 255)
        np.testing.assert_allclose(only(number, ramp, brightness=32.0)[0, :, 0], expected, atol=1)


def test_contrast_multiplies() -> None:
    factors = np.array([only(n, grey(160), contrast=(0.5, 1.5))[0, 0, 0] / 160 for n in range(600)])
    assert 0.49 <= factors.min() < 0.52 and 1.48 < factors.max() < 1.5
    counts, _ = np.histogram(factors, 4, (0.5, 1.5))
    assert counts.min() > 105
    assert (only(0, grey(200), contrast=(1.5, 1.5)) == 255).all()  # clipped


def test_saturation_changes_saturation_alone() -> None:
    colour = np.array([[[150, 100, 125]]], np.uint8)
    found = []
    for number in range(300):
        red, green, blue = only(number, colour, saturation=(0.5, 1.5))[0, 0].astype(int)
        assert red == 150  # the value, which is the largest component, is unchanged
        assert abs((blue - green) / (red - green) - 0.5) < 0.06  # and so is the hue
        found.append((red - green) / 50)
    assert 0.47 < min(found) < 0.55 and 1.45 < max(found) < 1.53
    np.testing.assert_allclose(np.mean(found), 1.0, atol=0.06)
    assert (only(0, grey(90), saturation=(1.5, 1.5)) == 90).all()


def test_hue_turns() -> None:
    red = np.array([[[200, 0, 0]]], np.uint8)
    turns = []
    for number in range(600):
        r, g, b = only(number, red, hue=18)[0, 0].astype(int)
        assert r == 200 and min(g, b) == 0  # value and saturation are unchanged
        turns.append(round((g - b) / 200 * 30))  # 30 of 180 hue units from red to yellow
    assert set(turns) == set(range(-18, 18))
    assert np.array_equal(only(0, grey(77), hue=90), grey(77))


def test_contrast_comes_first_or_last_with_equal_chances() -> None:
    """Clipping after brightening loses saturation, so the results of the two orders differ."""
    colour = np.array([[[200, 100, 100]]], np.uint8)
    strengths = {"contrast": (1.5, 1.5), "saturation": (0.5, 0.5)}
    # First: (255, 150, 150), then half its saturation. Last: (200, 150, 150) times 1.5.
    results = [tuple(map(int, only(n, colour, **strengths)[0, 0])) for n in range(300)]
    first = sum(np.allclose(result, (255, 202, 202), atol=2) for result in results)
    last = sum(np.allclose(result, (255, 225, 225), atol=2) for result in results)
    assert first + last == 300 and 110 < first < 190


def test_each_change_comes_with_the_probability() -> None:
    colour = np.full((1, 1, 3), (200, 100, 150), np.uint8)  # unchanged by conversion to HSV and back
    for strength in ({"brightness": 32.0}, {"contrast": (0.5, 0.6)}, {"saturation": (0.5, 0.6)}, {"hue": 18}):
        changed = [(distorted(colour, n, **{**UNCHANGED, **strength}) != colour).any() for n in range(300)]
        assert 0.38 < np.mean(changed) < 0.62, strength
    image = random_image(6, 6)
    unchanged = [np.array_equal(distorted(image, n), image) for n in range(600)]
    assert 0.03 < np.mean(unchanged) < 0.1  # none of the four: 1 / 16
    assert np.array_equal(distorted(image, 0, probability=0.0), image)


def _hsv(image: np.ndarray) -> list[np.ndarray]:
    """OpenCV's 8-bit HSV by definition: hue 0 to 179, saturation and value 0 to 255, rounded."""
    red, green, blue = (image[..., channel].astype(float) for channel in range(3))
    value = image.max(-1).astype(float)
    chroma = value - image.min(-1)
    safe = np.where(chroma == 0, 1, chroma)
    hue = np.select(
        [chroma == 0, value == red, value == green],
        [0 * value, 60 * (green - blue) / safe, 120 + 60 * (blue - red) / safe],
        240 + 60 * (red - green) / safe,
    )
    saturation = np.where(value == 0, 0, 255 * chroma / np.where(value == 0, 1, value))
    return [np.round(hue % 360 / 2) % 180, np.round(saturation), value]


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    sector = hue / 30
    channels = []
    for offset in (5, 3, 1):
        k = (offset + sector) % 6
        channels.append(value * (1 - saturation / 255 * np.clip(np.minimum(k, 4 - k), 0, 1)))
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def test_distortion_follows_its_definition() -> None:
    """Parity with all changes in the protocol's order in plain NumPy, from the same random numbers."""
    image = random_image(30, 30)
    kinds = set()
    for number in range(60):
        draw = transforms.generator((number, 3), transforms._COLOUR)
        brighter, contrasted, saturated, turned = draw.random(4) < 0.5
        first = draw.random() < 0.5
        amount, contrast, saturation = draw.uniform(-32, 32), draw.uniform(0.5, 1.5), draw.uniform(0.5, 1.5)
        turn = draw.integers(-18, 18)
        expected = _bytes(image + np.float32(amount)) if brighter else image
        if contrasted and first:
            expected = _bytes(expected * np.float32(contrast))
        if saturated or turned:
            hue, strength, value = _hsv(expected)
            strength = _bytes(strength * np.float32(saturation)) if saturated else strength
            expected = _rgb((hue + (turn if turned else 0)) % 180, strength, value)
        if contrasted and not first:
            expected = _bytes(expected * np.float32(contrast))
        # OpenCV rounds in fixed point; a hue halfway between two of the 180 may round to either, which is 9 levels.
        difference = np.abs(distorted(image, number).astype(int) - expected)
        assert difference.max() <= 13 and difference.mean() < 0.2 and (difference > 1).mean() < 0.02
        kinds.add((brighter, contrasted, first, saturated, turned))
    assert len(kinds) > 20


def test_the_image_that_was_given_stays_as_it_was() -> None:
    image = random_image(33, 46)
    before = image.copy()
    for number in range(5):
        distorted(image, number, probability=1.0)
    np.testing.assert_array_equal(image, before)


def test_a_strength_does_not_change_what_others_draw() -> None:
    grey_ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)  # saturation and hue do not change grey
    for number in range(20):
        alone = distorted(grey_ramp, number, saturation=(1.0, 1.0), hue=0)
        np.testing.assert_array_equal(alone, distorted(grey_ramp, number))
