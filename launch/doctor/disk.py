"""Which file system the checkpoint is on, and how fast it is, by reading a sample of it past the page cache."""

from __future__ import annotations

import mmap
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from launch.bench.disk_reads import cached_share
from launch.doctor.finding import Finding, bad, ok, refused, skipped, warning
from launch.doctor.request import DoctorRequest
from tprt.errors import CheckpointError
from tprt.weights.file_reader import FileReader, buffer_bytes
from tprt.weights.read_plan import CHUNK_BYTES
from tprt.weights.reading import NUM_READERS

_NAME = "disk"
_MOUNTS = Path("/proc/self/mountinfo")
# Spaces and the like in its names.
_OCTAL = re.compile(r"\\([0-7]{3})")
_MIB = 2**20
# The sample: so many chunks, spread over all files, and none is begun later than this.
_NUM_CHUNKS = 32
_SAMPLE_S = 1.0
# Longer than this to read the checkpoint is worth a word.
_LONG_S = 60.0


@dataclass(frozen=True, slots=True)
class Mount:
    """A file system: its type, what it is on, where it is mounted."""

    kind: str
    source: str
    place: str


def check_disk(request: DoctorRequest) -> Iterator[Finding]:
    """Read a sample and say how long the whole will take."""
    folder = Path(request.config.model.path).resolve()
    # A link to nothing stays, for the reader to name.
    files = sorted(file for file in folder.glob("*.safetensors") if not file.exists() or file.stat().st_size)
    if request.config.model.load_format == "dummy" or not files:
        yield skipped(_NAME, "there are no weights to read")
        return
    mount = find_mount(folder, _MOUNTS.read_text(encoding="utf-8"))
    try:
        bytes_per_s = read_sample(files, min(_SAMPLE_S, request.left_s(_SAMPLE_S)))
    except CheckpointError as error:
        yield refused(_NAME, error, f"see whether {mount.place} ({mount.kind} on {mount.source}) is sound")
        return
    yield _judge(request, files, mount, bytes_per_s)


def _judge(request: DoctorRequest, files: Sequence[Path], mount: Mount, bytes_per_s: float) -> Finding:
    total = sum(file.stat().st_size for file in files)
    cached = cached_share(files)
    needed_s = total / bytes_per_s
    in_cache = "" if cached is None else f"; {cached:.0%} of it is in the page cache"
    text = (
        f"{mount.kind} on {mount.source}: {bytes_per_s / 1e6:,.0f} MB/s by sample, {needed_s:,.1f} s for the"
        f" {total // _MIB:,} MiB of the checkpoint{in_cache}"
    )
    details = {"file_system": mount.kind, "bytes_per_s": round(bytes_per_s), "cached": cached, "bytes": total}
    timeout_s = request.config.supervision.startup_timeout_s
    cold_s = total * (1 - (cached or 0.0)) / bytes_per_s
    if cold_s > timeout_s:
        fix = "copy the checkpoint to a local disk, or raise supervision.startup_timeout_s"
        return bad(_NAME, f"{text}; a start has {timeout_s:g} s", fix, **details)
    if cold_s > _LONG_S:
        return warning(_NAME, text, "copy the checkpoint to a faster disk (a local NVMe)", **details)
    return ok(_NAME, text, **details)


def read_sample(files: Sequence[Path], longest_s: float) -> float:
    """Return the bytes per second of chunks spread over `files`, read by as many threads as a rank has.

    Raises:
        CheckpointError: a file cannot be read.
    """
    readers = [FileReader(file, past_cache=True) for file in files]
    chunks = [
        (reader, start, min(start + CHUNK_BYTES, size))
        for reader, size in zip(readers, (file.stat().st_size for file in files), strict=True)
        for start in range(0, size, CHUNK_BYTES)
    ]
    chosen = chunks[:: max(1, len(chunks) // _NUM_CHUNKS)]
    began_s = time.monotonic()
    try:
        with ThreadPoolExecutor(NUM_READERS) as pool:
            parts = [chosen[index::NUM_READERS] for index in range(NUM_READERS)]
            read = sum(pool.map(lambda part: _read(part, began_s + longest_s), parts))
        return read / (time.monotonic() - began_s)
    finally:
        for reader in readers:
            reader.close()


def _read(chunks: Sequence[tuple[FileReader, int, int]], end_s: float) -> int:
    """Read one chunk after another, none after `end_s` but the first; return the bytes."""
    read = 0
    with mmap.mmap(-1, buffer_bytes(CHUNK_BYTES)) as memory, memoryview(memory) as buffer:
        for reader, start, stop in chunks:
            if read and time.monotonic() > end_s:
                break
            reader.read(buffer, start, stop)
            read += stop - start
    return read


def find_mount(folder: Path, mountinfo: str) -> Mount:
    """Return the file system that `folder` is on, by the lines of /proc/self/mountinfo (proc(5))."""
    found = Mount("an unknown file system", "an unknown device", "/")
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        place = _OCTAL.sub(lambda code: chr(int(code[1], 8)), before.split()[4])
        kind, source = after.split()[:2]
        # The last of equals covers those before it.
        if folder.is_relative_to(place) and len(place) >= len(found.place):
            found = Mount(kind, source, place)
    return found
