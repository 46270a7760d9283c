"""The pages that people look at, opened in a real browser where there is one."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")), reason="wants chromium and chromedriver"
    ),
]
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))


def test_a_page_is_pictured_whole_at_both_widths(tmp_path):
    from screenshots import picture_report

    page = tmp_path / "page.html"
    page.write_text(
        "<meta name=viewport content='width=device-width'><body style='margin:0'>"
        "<div style='height:2000px;background:rgb(255,0,0)'></div><div style='height:10px;background:rgb(0,0,255)'>"
    )
    for path, width in zip(picture_report(page, tmp_path), (1400, 390), strict=True):
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert picture.shape[:2] == (2010, width)
        assert tuple(picture[5, 5]) == (255, 0, 0)
        assert tuple(picture[-5, 5]) == (0, 0, 255)


def test_a_page_that_is_too_wide_for_a_phone_is_told(tmp_path):
    from screenshots import picture_report

    page = tmp_path / "page.html"
    page.write_text("<meta name=viewport content='width=device-width'><div style='width:700px'>wide</div>")
    with pytest.raises(ValueError, match="in a window of 390"):
        picture_report(page, tmp_path)


def test_tensorboard_shows_its_pages(tmp_path):
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning_fixtures import ForeignModule, batches, loader, small_config, trainer_of
    from screenshots import picture_tensorboard

    from lightning_moe import MoEUpcycleCallback

    logger = TensorBoardLogger(tmp_path / "logs")
    trainer = trainer_of(tmp_path, [MoEUpcycleCallback(small_config())], logger=logger, log_every_n_steps=1)
    trainer.fit(ForeignModule(), loader(batches(3)))
    (tmp_path / "pictures").mkdir()
    for path in picture_tensorboard(tmp_path / "logs", tmp_path / "pictures"):
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert picture.shape[1] == 1400
        # TensorBoard's orange bar, and below it more than one plain page of grey
        assert picture[20, 300, 0] > 200 > picture[20, 300, 2]
        assert len(np.unique(picture[200:, 300:].reshape(-1, 3), axis=0)) > 30
