import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lamella.errors import LamellaError
from lamella.lab.report import PictureGrid, render
from lamella.lab.report.pictures import picture_view


def picture(seed, size=(4, 6)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture
def grid():
    columns = {"cat alone": [picture(0), picture(1)], "MOLE": [picture(2), picture(3)]}
    return PictureGrid(["a cat", 'a "dog" <b>'], columns, "two LoRAs")


def test_every_picture_is_in_the_page_itself_to_the_last_bit(report, grid):
    page = render(replace(report, pictures=grid))
    sources = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]
    assert len(shown) == 4
    for found, expected in zip(shown, (picture(0), picture(2), picture(1), picture(3)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_pictures_are_said_in_words_and_prompts_are_escaped(report, grid):
    page = render(replace(report, pictures=grid))
    assert 'alt="MOLE: a cat"' in page
    assert "<b>" not in page
    assert "a &#34;dog&#34; &lt;b&gt;" in page
    assert 'href="#pictures"' in page


def test_the_policy_allows_pictures_of_the_page_alone_and_only_where_there_are_some(report, grid):
    def policy(page):
        return re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]

    assert "img-src" not in policy(render(report))
    assert 'id="pictures"' not in render(report)
    with_pictures = policy(render(replace(report, pictures=grid)))
    assert "img-src data:" in with_pictures.split("; ")
    assert "http" not in with_pictures


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({}, "needs a prompt and a column"),
        ({"a": [picture(0)]}, "'a' of 'g' has 1 pictures for 2 prompts"),
        ({"a": [picture(0).astype(np.float32), picture(1)]}, "(4, 6, 3) of float32"),
        ({"a": [picture(0)[..., 0], picture(1)]}, "(4, 6) of uint8"),
    ],
)
def test_what_is_no_grid_is_refused(columns, said):
    with pytest.raises(LamellaError, match=re.escape(said)):
        picture_view(PictureGrid(["x", "y"], columns, "g"))
