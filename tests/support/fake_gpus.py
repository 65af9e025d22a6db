"""Libraries that stand for CUDA's driver and NCCL where there is no GPU, with faults to order.

FAKE_CUDA_DEVICES says how many devices there are, FAKE_CUDA_FAULTS what is wrong with them (fake_cuda.c).
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler (cc)")
_SOURCES = {"libcuda.so.1": "fake_cuda.c", "libnccl.so.2": "fake_nccl.c"}
# Python runs this before anything else: a torch for CPUs says that it is one for CUDA.
_SITE = """
import importlib.util, os, pathlib, sys, time

class SlowTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            time.sleep(60)


file = pathlib.Path(importlib.util.find_spec("torch").origin).with_name("version.py")
spec = importlib.util.spec_from_file_location("torch.version", file)
version = importlib.util.module_from_spec(spec)
spec.loader.exec_module(version)
version.cuda = "12.8"
if "torch-slow" in os.environ["FAKE_CUDA_FAULTS"]:
    sys.meta_path.insert(0, SlowTorch())
sys.modules["torch.version"] = version
"""


def build_fakes(folder: Path) -> Path:
    """Compile the libraries into `folder`, for LD_LIBRARY_PATH, with what PYTHONPATH needs; returns it."""
    for library, source in _SOURCES.items():
        file = Path(__file__).with_name(source)
        command = ["cc", "-shared", "-fPIC", "-O1", "-pthread", "-o", folder / library, file]
        subprocess.run(command, check=True, timeout=60)
    (folder / "sitecustomize.py").write_text(_SITE)
    return folder
