"""How others fill the same parameters from the same files, one function for each way.

Each reads file after file, in the order of the bytes, as their users do, and copies into the parameters that
tprt's own models have. Knows nothing of processes and of time.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from tprt.weights import open_checkpoint
from tprt.weights.matching import Match, match_tensors

Peer = Callable[[nn.Module, str], int]


def load_whole_tensors(model: nn.Module, folder: str) -> int:
    """Take every tensor in full by `safe_open().get_tensor()`, then `narrow()`.

    Returns:
        Bytes asked for; so do the others.
    """
    asked = 0
    for file, wanted in _by_file(model, folder):
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for match in wanted:
                asked += _fill_from_whole(match, tensors.get_tensor(match.entry.name))
    return asked


def load_slices(model: nn.Module, folder: str) -> int:
    """Take exactly this rank's part of every tensor by `safe_open().get_slice()`."""
    asked = 0
    for file, wanted in _by_file(model, folder):
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for match in wanted:
                kept = slice(match.part.source.start, match.part.source.stop)
                tensor = tensors.get_slice(match.entry.name)
                asked += _fill(match, tensor[kept] if match.part.dim == 0 else tensor[:, kept])
    return asked


def load_with_fastsafetensors(model: nn.Module, folder: str) -> int:
    """Let fastsafetensors read the files into memory, one at a time, then `narrow()`."""
    library = importlib.import_module("fastsafetensors")
    asked = 0
    for file, wanted in _by_file(model, folder):
        loader = library.SafeTensorsFileLoader(library.SingleGroup(), "cpu", nogds=True)
        loader.add_filenames({0: [str(file)]})
        buffer = loader.copy_files_to_device()
        for match in wanted:
            asked += _fill_from_whole(match, buffer.get_tensor(match.entry.name))
        buffer.close()
        loader.close()
    return asked


def load_with_runai_streamer(model: nn.Module, folder: str) -> int:
    """Let Run:ai's streamer read the files with its threads; take tensors as they come, then `narrow()`."""
    library = importlib.import_module("runai_model_streamer")
    asked = 0
    for file, wanted in _by_file(model, folder):
        by_name = {match.entry.name: match for match in wanted}
        with library.SafetensorsStreamer() as streamer:
            streamer.stream_file(str(file))
            for name, tensor in streamer.get_tensors():
                if name in by_name:
                    asked += _fill_from_whole(by_name[name], tensor)
    return asked


def installed_peers() -> dict[str, Peer]:
    """Import the ways that can be gone here and return them by name; the first two always can."""
    peers: dict[str, Peer] = {"get_tensor": load_whole_tensors, "get_slice": load_slices}
    optional: dict[str, Peer] = {
        "fastsafetensors": load_with_fastsafetensors,
        "runai_model_streamer": load_with_runai_streamer,
    }
    for name, peer in optional.items():
        if importlib.util.find_spec(name):
            importlib.import_module(name)
            peers[name] = peer
    return peers


def _by_file(model: nn.Module, folder: str) -> Iterator[tuple[Path, list[Match]]]:
    by_file: dict[Path, list[Match]] = defaultdict(list)
    for match in match_tensors(model, open_checkpoint(folder)):
        by_file[match.entry.file].append(match)
    for file in sorted(by_file):
        yield file, sorted(by_file[file], key=lambda match: match.entry.offset)


def _fill_from_whole(match: Match, tensor: Tensor) -> int:
    part = match.part
    _fill(match, tensor.narrow(part.dim, part.source.start, part.source.size))
    return tensor.nbytes


def _fill(match: Match, tensor: Tensor) -> int:
    part = match.part
    match.parameter.data.narrow(part.dim, part.dest, part.source.size).copy_(tensor)
    return tensor.nbytes
