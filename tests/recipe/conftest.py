"""Fixtures that the tests of recipe recovery share."""

from __future__ import annotations

import pytest

from tests.recipe.tunes import Tunes
from tests.recipe.worlds import quiet_mergekit


@pytest.fixture(scope="session")
def tunes(tmp_path_factory: pytest.TempPathFactory) -> Tunes:
    with quiet_mergekit():
        import mergekit.merge  # noqa: F401 - its first import warns
    return Tunes(tmp_path_factory.mktemp("tunes"))
