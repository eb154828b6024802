"""The log channels: silent unless asked for, clear about a name that does not exist."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import fabric_init
from fabric_init import _log

PROGRAM = """
import torch
from torch import nn
import fabric_init
torch.save({"weight": torch.ones(2, 2, dtype=torch.bfloat16)}, "weights.pt")
with fabric_init.deferred_init():
    model = nn.Linear(2, 2)
fabric_init.materialize(model, checkpoint="weights.pt", strict=False)
"""


def stderr_of(channels: str, folder: os.PathLike[str]) -> str:
    environment = {**os.environ, _log.VARIABLE: channels}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True).stderr


def test_the_environment_variable_turns_channels_on(tmp_path: os.PathLike[str]) -> None:
    lines = stderr_of("record,plan, Fill", tmp_path).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        *["fabric_init.record"] * 2,
        *["fabric_init.plan"] * 2,
        *["fabric_init.fill"] * 3,
    ]
    assert "2 ops on 2 storages (24 bytes)" in lines[1]
    assert lines[2] == "fabric_init.plan: 2 tensors: 1 loaded, 1 initialized; 1 cast; checkpoint weights.pt (torch)"
    assert lines[3] == "fabric_init.plan: weights.pt: loaded in part: the model: weight, but not bias"
    assert "weight[2, 2] float32: loaded from weight, cast from bfloat16; 16 bytes on cpu" in lines[4]
    assert "bias[2] float32: initialized by uniform_(" in lines[5]
    assert "filled 2 tensors, 24 bytes" in lines[6]


def test_an_unknown_channel_is_a_warning_that_lists_the_known_ones(tmp_path: os.PathLike[str]) -> None:
    lines = stderr_of("plane", tmp_path)
    assert "there is no channel 'plane'. Known channels: record, plan, fill, all." in lines
    assert "fabric_init." not in lines.replace("fabric_init/_log.py", ""), "it is silent otherwise"


def test_all_stands_for_every_channel() -> None:
    assert list(_log.channels_in("all")) == list(_log.CHANNELS)
    assert list(_log.channels_in(" Plan ,,fill")) == ["plan", "fill"]
    with pytest.warns(UserWarning, match="Known channels"):
        assert list(_log.channels_in("nothing")) == []


def test_an_application_configures_channels_like_any_other_logger(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="fabric_init.plan"), fabric_init.deferred_init():
        model = nn.Linear(2, 2)
    with caplog.at_level(logging.DEBUG, logger="fabric_init.plan"):
        fabric_init.materialize(model)
    assert [record.name for record in caplog.records] == ["fabric_init.plan"]
    assert caplog.records[0].getMessage() == "2 tensors: 2 initialized; no checkpoint"


def test_a_block_that_raises_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.DEBUG, logger="fabric_init.record"),
        pytest.raises(ZeroDivisionError),
        fabric_init.deferred_init(),
    ):
        torch.ones(2)
        _ = 1 / 0
    assert "block closed by ZeroDivisionError after" in caplog.records[-1].getMessage()


def test_lines_of_several_ranks_say_which_rank_they_are_from(monkeypatch: pytest.MonkeyPatch) -> None:
    formatter = _log.RankFormatter("%(name)s: %(message)s")
    record = logging.LogRecord("fabric_init.fill", logging.DEBUG, "", 0, "text", (), None)
    assert formatter.format(record) == "fabric_init.fill: text"
    for name, value in {"is_initialized": True, "get_world_size": 2, "get_rank": 1}.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert formatter.format(record) == "[rank 1] fabric_init.fill: text"
