"""What the tests share: scripts run as a user runs them, and small folders of real image files."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

HOUSE = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path):
    """run("train.py", "--epochs", 1, ...) -> CompletedProcess, in an empty folder; `code` runs before main."""

    def run(script, *arguments, code=None, cwd=tmp_path, timeout=240, **environment):
        command = [str(HOUSE / script)]
        if code:  # as `python script`, with something of the script's modules changed first
            start = (
                f"import runpy, sys; sys.path.insert(0, {str(HOUSE)!r}); sys.argv[0] = {script!r}; {code}; "
            )
            command = ["-c", start + f"runpy.run_path({str(HOUSE / script)!r}, run_name='__main__')"]
        return subprocess.run(
            [sys.executable, *command, *map(str, arguments)],
            check=False,
            cwd=cwd,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def one_line():
    """Assert that a process ended with a status and one line that holds the given words."""

    def check(process, status, *words):
        assert process.returncode == status, process.stderr
        assert process.stderr.count("\n") == 1 and "Traceback" not in process.stderr, process.stderr
        for word in words:
            assert word in process.stderr

    return check


@pytest.fixture
def image_folder(tmp_path):
    """image_folder(classes, counts) -> a folder of random PNG files in the layout of CINIC-10."""

    def make(
        classes=("cat", "dog"), splits=(("train", 6), ("valid", 2), ("test", 3)), size=32, name="images"
    ):
        generator = np.random.default_rng(0)
        for split, count in splits:
            for kind in classes:
                folder = tmp_path / name / split / kind
                folder.mkdir(parents=True)
                for i in range(count):
                    pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
        return tmp_path / name

    return make
