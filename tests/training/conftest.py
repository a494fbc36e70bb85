"""An image folder."""

from pathlib import Path

import pytest

from tests.training.test_data import write_tree


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "images", per_class=24, size=16)
