"""Which Python `./dev` sets up with."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import replfs

DEV = Path(replfs.__path__[0]).parent / "dev"
SYSTEM = "/usr/bin/python3"


def found(path: Path, **settings: str) -> str:
    """What `find_python` of `dev` finds, where another python3 is the first in the PATH."""
    other = path / "python3"
    other.symlink_to(sys.executable)
    [function] = re.findall(r"^find_python\(\) \{.*?^\}", DEV.read_text(), re.MULTILINE | re.DOTALL)
    found = subprocess.run(
        ["sh", "-euc", f"{function}\nfind_python"],
        env={"PATH": os.pathsep.join((str(path), os.environ["PATH"])), **settings},
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return found.stdout.strip()


def test_the_distributions_python_comes_before_another_one_in_the_path(tmp_path):
    new_enough = "import sys; sys.exit(sys.version_info < (3, 11))"
    if not Path(SYSTEM).exists() or subprocess.run([SYSTEM, "-c", new_enough]).returncode:
        pytest.skip("the distribution has no Python that is new enough")
    assert found(tmp_path) == SYSTEM


def test_the_python_that_is_named_comes_first(tmp_path):
    assert found(tmp_path, PYTHON="python3") == "python3"
