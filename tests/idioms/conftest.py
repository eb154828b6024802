from __future__ import annotations

import pytest

from tests.idioms.setups import Files, write_files


@pytest.fixture(scope="package")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Weights of a model with a tie, in all formats."""
    return write_files(tmp_path_factory.mktemp("files"), "even")


@pytest.fixture(scope="package")
def untied_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Weights of a model without ties, which loads that replace parameters would cut, in plain PyTorch, too."""
    return write_files(tmp_path_factory.mktemp("untied"), "even, untied")
