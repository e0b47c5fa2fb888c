"""What the tests share: running scripts as a user does, and small folders of real image files."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

# pytest-xdist workers share the cores. Torch reads the variable when imported, which a plugin may have done
share = max(1, os.cpu_count() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
given = os.environ.get("OMP_NUM_THREADS", "")
threads = min(share, int(given)) if given.isdecimal() and int(given) else share
os.environ["OMP_NUM_THREADS"] = str(threads)

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(threads)
HOUSE = Path(__file__).resolve().parent.parent


# Reads one command per line and runs it in a fork: a separate process that need not import torch again
SERVER = """
import json, os, runpy, signal, sys, traceback
import torch._dynamo, torchvision
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(240)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        for number, name in enumerate(("input", "output", "errors")):
            os.dup2(os.open(os.path.join(request["shown"], name), os.O_RDWR | os.O_CREAT), number)
        sys.argv, sys.path[0], status = [request["script"], *request["arguments"]], request["house"], 0
        try:
            exec(request["code"] or "")
            runpy.run_path(os.path.join(request["house"], request["script"]), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def forks():
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def run(tmp_path, tmp_path_factory, forks):
    """run("train.py", "--epochs", 1, ...) -> CompletedProcess, in an empty folder; `code` runs first."""

    def run(script, *arguments, code=None, cwd=tmp_path, **environment):
        shown, arguments = tmp_path_factory.mktemp("shown"), list(map(str, arguments))
        request = {"script": script, "arguments": arguments, "code": code, "cwd": cwd, "shown": shown}
        request |= {"house": HOUSE, "environment": {**os.environ, **environment}}
        print(json.dumps(request, default=str), file=forks.stdin, flush=True)
        status = int(forks.stdout.readline())
        output, errors = ((shown / name).read_text() for name in ("output", "errors"))
        return subprocess.CompletedProcess([script, *arguments], status, output, errors)

    return run


@pytest.fixture
def one_line():
    """Assert that a process ended with a status and one line that contains the given words."""

    def check(process, status, *words):
        assert process.returncode == status, process.stderr
        assert process.stderr.count("\n") == 1 and "Traceback" not in process.stderr, process.stderr
        assert all(word in process.stderr for word in words), process.stderr

    return check


@pytest.fixture
def image_folder(tmp_path):
    """image_folder(classes, counts) -> a folder of random PNG files in the layout of CINIC-10."""

    def make(classes=("cat", "dog"), splits=(("train", 6), ("valid", 2), ("test", 3)), name="images"):
        generator = np.random.default_rng(0)
        for (split, count), kind in itertools.product(splits, classes):
            folder = tmp_path / name / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
        return tmp_path / name

    return make


@pytest.fixture
def tiny(image_folder):
    """Arguments of a run that takes seconds: two classes of 20 images, in the folder `images`."""
    image_folder(splits=(("train", 20), ("valid", 4), ("test", 6)))
    return ("--data", "images")


def results(folder):
    """Every result file below a folder, without what may differ between runs, such as times and memory."""
    found = {}
    for path in sorted(folder.rglob("seed*.json")):
        result = json.loads(path.read_text())
        for entry in result["history"]:
            del entry["seconds"], entry["images_per_second"]
        del result["seconds"], result["peak_memory_bytes"]
        for name in ("out", "force", "root", "graph", "checkpoint_every"):
            del result["config"][name]
        found[str(path.relative_to(folder))] = result
    return found


def assert_same_bits(first, second):
    """In every result and weights file below two folders."""
    assert results(first) == results(second)
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*.pt")) for folder in (first, second)]
    assert files[0] == files[1] != []
    for name in files[0]:
        both = (torch.load(folder / name, weights_only=True)["state_dict"] for folder in (first, second))
        torch.testing.assert_close(*both, rtol=0, atol=0)


class FarDevice(TorchDispatchMode):
    """Treats device `meta` as a GPU without float64: operations that create float64 there fail, and reads by
    the host, which return ones, are listed by name in `reads`."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords, name = keywords or {}, function.overloadpacket.__name__
        if any(isinstance(a, torch.Tensor) and a.is_meta for a in arguments):
            to = arguments[0].device if name == "copy_" else name == "_to_copy" and keywords.get("device")
            if name in ("_local_scalar_dense", "is_nonzero", "equal"):
                self.reads.append(name)
                return 1.0 if arguments[0].is_floating_point() else 1
            if to and torch.device(to).type == "cpu":
                self.reads.append(name)
                return torch.ones(arguments[-1].shape, dtype=keywords.get("dtype") or arguments[-1].dtype)
        result = function(*arguments, **keywords)
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                assert tensor.dtype != torch.float64, f"{name} makes float64 on the device"
        return result


class Reads(TorchDispatchMode):
    """Lists, by name, operations that on a GPU would make the host wait for a value or a size."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        waiting = "_local_scalar_dense is_nonzero equal nonzero masked_select unique_dim _unique2"
        by_bool = name == "index" and any(t is not None and t.dtype == torch.bool for t in arguments[1])
        if name in waiting.split() or by_bool:
            self.reads.append(name)
        return function(*arguments, **(keywords or {}))


def pytest_collection_modifyitems(items):
    """Skip what needs a GPU where there is none. What starts no script runs first: it shows most failures."""
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    slow = ("test_trust.py", "test_run_all.py", "test_benchmark.py")
    items.sort(key=lambda item: "run" in item.fixturenames or item.path.name in slow)
