from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from unmerge.errors import UnmergeError
from unmerge.experiment.command import app


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "no preset is named 'huge': the presets are micro, qwen2.5-7b"),
        (["--seeds", "0,x"], "expected numbers such as 0,1,2"),
        (["--seeds", "-1"], "not negative"),
    ],
)
def test_bad_usage_is_one_clear_line(tmp_path, arguments, message):
    result = CliRunner().invoke(app, ["run", "--output", str(tmp_path / "x"), *arguments])
    assert isinstance(result.exception, UnmergeError)
    assert message in str(result.exception)
    assert not (tmp_path / "x").exists()


def test_the_commands_load_nothing_heavy():
    code = "import sys; import unmerge.experiment.command; print(sorted({'torch', 'mergekit'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
