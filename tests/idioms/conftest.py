from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.idioms.setups import Files, write_files


@pytest.fixture(scope="package")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Weights of a model with a tie, in all formats."""
    return write_files(tmp_path_factory.mktemp("files"), "even")


@pytest.fixture(scope="package")
def untied_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Weights of a model without ties, which loads that replace parameters would cut, in plain PyTorch, too."""
    return write_files(tmp_path_factory.mktemp("untied"), "even, untied")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the ranks: with more threads, sums come in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
