"""Every architecture in transformers that plain PyTorch can build is built the same by recording and replaying.

Compared are all parameters, buffers and plain tensor attributes, bit for bit; their types, dtypes, devices, strides and
``requires_grad``; ties and shared memory; and the modules with their flags and plain attributes. What counts as an
architecture is said in ``architectures.py``. Without ``--whole`` a fixed sample runs, chosen to cover what is unusual.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import architectures
from tests.support.workers import ANSWERS, Workers

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)

SAMPLE = tuple(
    f"{name}/modeling_{name}"
    for name in [
        "albert",
        "bart",
        "bert",
        "big_bird",
        "blip",
        "clip",
        "convnext",
        "deberta_v2",
        "deepseek_v3",
        "detr",
        "dinov2",
        "electra",
        "encodec",
        "esm",
        "falcon",
        "funnel",
        "gemma3",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "hiera",
        "idefics3",
        "jamba",
        "llama",
        "longformer",
        "mamba2",
        "mixtral",
        "mpnet",
        "nystromformer",
        "olmo2",
        "owlvit",
        "patchtst",
        "phi3",
        "qwen2_vl",
        "qwen3_moe",
        "reformer",
        "roberta",
        "rwkv",
        "sam",
        "swin",
        "t5",
        "timesformer",
        "univnet",
        "vit",
        "vits",
        "wav2vec2",
        "whisper",
        "xlnet",
        "yolos",
        "zoedepth",
    ]
)
FEWEST = 500


def _chosen(config: pytest.Config) -> list[str]:
    return architectures.names() if config.getoption("--whole") else list(SAMPLE)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        metafunc.parametrize("architecture", _chosen(metafunc.config))


@pytest.fixture(scope="module")
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    workers = Workers()
    asked = {
        getattr(item, "callspec", None) and item.callspec.params.get("architecture") for item in request.session.items
    }
    workers.start([name for name in _chosen(request.config) if name in asked])
    yield workers
    workers.stop()


@pytest.mark.sweep
def test_recorded_init_is_bit_identical_to_eager_init(
    architecture: str, workers: Workers, request: pytest.FixtureRequest
) -> None:
    answer: dict[str, Any] = workers.answers[architecture].result()
    request.config.stash[ANSWERS].append(answer)
    if not answer["models"] and request.config.getoption("--whole"):
        pytest.skip(f"plain PyTorch cannot build it here: {answer['not_built']}")
    assert answer["models"], f"the sample is of architectures that can be built: {answer['not_built']}"
    wrong = {model["name"]: model["differences"] for model in answer["models"] if model["differences"]}
    assert not wrong, "\n".join(f"{name}: {line}" for name, lines in wrong.items() for line in lines)
    assert all(model["tensors"] > 0 for model in answer["models"])


@pytest.mark.sweep
def test_the_whole_is_more_than_500_architectures(request: pytest.FixtureRequest) -> None:
    """Runs last: guards against a shrinking that no longer fits transformers and quietly skips everything."""
    answers = request.config.stash[ANSWERS]
    if request.config.getoption("--whole") and len(answers) == len(architectures.names()):
        assert sum(bool(answer["models"]) for answer in answers) > FEWEST
    else:
        assert len(architectures.names()) > FEWEST
