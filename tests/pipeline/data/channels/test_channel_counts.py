"""The levels of each channel, counted in parts, and what the terminal says of them."""

import numpy as np
import pytest

from firstlight.pipeline.data.channels.channel_counts import ChannelCounts, describe_channels
from firstlight.pipeline.data.channels.channel_image import ChannelImage
from firstlight.pipeline.data.channels.pixel_format import PixelFormat
from firstlight.pipeline.data.images.colours import ColourSums
from tests.support.channel_images import draw_bands


@pytest.mark.parametrize("channels", [1, 13])
def test_parts_add_up_to_the_whole(channels: int) -> None:
    images = [draw_bands(k, channels, 80) for k in range(4)]
    whole, parts = ChannelCounts(), [ChannelCounts(), ChannelCounts()]
    sums, halves = ColourSums(), [ColourSums(), ColourSums()]
    for k, values in enumerate(images):
        for counts in (whole, parts[k // 2]):
            assert not counts.add_image(ChannelImage(values))
        for found in (sums, halves[k // 2]):
            found.add_levels(values, 65535)
    added, total = ChannelCounts(), ColourSums()
    for counts, found in zip(parts, halves, strict=True):
        added.merge_counts(counts.dump_counts())
        total.merge_sums(found.dump_sums())
    assert added == whole
    assert total == sums
    assert added.pixels == PixelFormat(channels, 16)
    assert added.high == np.stack(images).max((0, 1, 2)).tolist()
    lines = describe_channels({"pixels": whole.dump_counts(), "colours": sums.dump_sums()})
    assert len(lines) == 1 + channels
    assert lines[1].startswith(f"channel 1: levels {whole.low[0]:,} to {whole.high[0]:,}, mean ")


def test_image_of_one_level_is_reported_and_no_image_counts_nothing() -> None:
    assert ChannelCounts().add_image(ChannelImage(np.full((4, 4, 2), 7, np.uint16)))
    assert ChannelCounts().dump_counts() == {}
    assert describe_channels({"colours": ColourSums().dump_sums()}) == []


def test_small_deviations_of_16_bits_have_their_digits() -> None:
    sums = ColourSums()
    values = np.random.default_rng(0).integers(100, 140, (32, 32, 2)).astype(np.uint16)
    sums.add_levels(values, 65535)
    found = sums.compute_colours(65535)
    assert np.allclose(np.array(found.mean) * 65535, values.mean((0, 1)), rtol=1e-4)
    assert np.allclose(np.array(found.std) * 65535, values.std((0, 1)), rtol=1e-2)
