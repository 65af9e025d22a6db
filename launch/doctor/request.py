"""What a check is told: the settings, what was asked on the command line, and when all must be over."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.cuda_devices import CudaDevice
from tprt.config import Config
from tprt.errors import ConfigError

_DRIVER = Path("/dev/nvidiactl")
# So much before the end a check gives up by itself, and can say what it was waiting for.
_TO_TELL_S = 0.5


@dataclass(frozen=True, slots=True)
class DoctorRequest:
    """One examination.

    Attributes:
        config: the settings of the deployment.
        hosts: names and ports of others that must be reached.
        end_s: when it ends, on the monotonic clock, which all processes of this host share.
        gpus: the details of the line `devices`, for a check that waited for it where ranks are on CUDA devices.
    """

    config: Config
    hosts: tuple[tuple[str, int], ...]
    end_s: float
    gpus: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_ranks(self) -> int:
        """The ranks of this host."""
        return len(self.ranks)

    @property
    def num_processes(self) -> int:
        """The ranks of this host in all replicas."""
        return self.num_ranks * self.config.parallel.data_parallel_size

    @property
    def ranks(self) -> range:
        """The numbers of the ranks of this host."""
        return self.config.ranks_of(self.config.hosts.node_rank)

    @property
    def is_spread(self) -> bool:
        """Whether there are ranks on other hosts."""
        return self.config.hosts.nnodes > 1

    @property
    def expects_cuda(self) -> bool:
        """Whether ranks are to compute on CUDA devices, as far as can be told without torch."""
        setting = self.config.runtime.device
        is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        return setting == "cuda" or (setting == "auto" and _DRIVER.exists() and not is_hidden)

    @property
    def devices(self) -> list[CudaDevice]:
        """The CUDA devices that could be opened, for a check that waited for them."""
        return [CudaDevice(**fields) for fields in self.gpus.get("devices", ())]

    @property
    def work_end_s(self) -> float:
        """When a check has to give up, so that it can still say what it was waiting for."""
        return self.end_s - _TO_TELL_S

    def left_s(self, most_s: float) -> float:
        """Return how long a check may wait for something: `most_s`, or what is left."""
        return max(0.0, min(most_s, self.work_end_s - time.monotonic()))

    def to_json(self) -> str:
        """Return it as text for another process."""
        fields = {"hosts": self.hosts, "end_s": self.end_s, "config": self.config.model_dump_json()}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> DoctorRequest:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        hosts = tuple((name, port) for name, port in fields["hosts"])
        return cls(Config.model_validate_json(fields["config"]), hosts, fields["end_s"])


def parse_host(text: str) -> tuple[str, int]:
    """Return name and port of `HOST:PORT`; an IPv6 address stands in brackets.

    Raises:
        ConfigError: it is no such thing.
    """
    name, colon, port = text.rpartition(":")
    name = name.removeprefix("[").removesuffix("]")
    if not colon or not name or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"--host {text}: expected HOST:PORT, such as node1:29500 or [fd00::2]:29500")
    return name, int(port)
