"""The private folder of one deployment: its sockets, its resolved configuration, its failure records.

Several replicas have a folder in it each, for all that the processes of one share.

Only small things: sockets take no space, so even a 1 MiB /dev/shm will do where nothing else is writable.

Whoever makes a folder holds a lock on a file in it and removes it. The kernel lets go of that lock with the
process, however that ends; a folder whose lock is free was left by a process that was killed, and whoever makes
the next one beside it removes it. A process id in its place could be that of another process by now, or of
another container that shares the folder above.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from tprt.config import Config
from tprt.errors import ConfigError

# A unix socket's path holds 107 bytes; the longest name below is under 40.
_MAX_FOLDER = 64
_PREFIX = "tprt-"
# Of folders that belong to no deployment.
_TRIAL_PREFIX = "tprt-trial-"
_LOCK = "owner.lock"
_CONFIG = "config.json"
# Is in a folder whose ranks somebody else has started.
_ADOPTS = "adopts-ranks"


class RunDir:
    """A folder that only this user can enter, and that is this process's to remove."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    @classmethod
    def create(cls, is_trial: bool = False, name: str | None = None) -> RunDir:
        """Make one in the first place that is writable, and remove what killed processes have left there.

        Args:
            is_trial: it is for no deployment, and none is found in it.
            name: under which ranks that another launcher has started look for it; see `find_named`.

        Raises:
            ConfigError: no writable place was found, or there is one of that name.
        """
        tried = []
        for parent in _places():
            _remove_abandoned(parent)
            try:
                path = _make_named(parent, name) if name else _make(parent, is_trial)
                return cls(path, _hold(path))
            except OSError as error:
                tried.append(f"{parent}: {error.strerror}")
        raise ConfigError(
            f"no place for the sockets of this deployment ({'; '.join(tried)}); set TMPDIR to a writable folder"
            f" whose path has at most {_MAX_FOLDER} bytes"
        )

    def remove(self) -> None:
        """Remove the folder with all that is in it; idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
        self._lock_fd = -1


@contextlib.contextmanager
def trial_dir() -> Iterator[Path]:
    """Give a run directory that belongs to no deployment, for the sockets of a bench or a check.

    Raises:
        ConfigError: as `RunDir.create` does.
    """
    run_dir = RunDir.create(is_trial=True)
    try:
        yield run_dir.path
    finally:
        run_dir.remove()


def _places() -> Iterator[str]:
    for parent in (os.environ.get("TMPDIR"), os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/run", "/dev/shm"):
        path = os.path.abspath(parent or "/")
        if parent and len(os.fsencode(path)) <= _MAX_FOLDER:
            yield path


def _make(parent: str, is_trial: bool) -> Path:
    return Path(tempfile.mkdtemp(prefix=_TRIAL_PREFIX if is_trial else _PREFIX, dir=parent))


def _make_named(parent: str, name: str) -> Path:
    path = Path(parent, _PREFIX + name)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        raise ConfigError(
            f"{path} is there already: ranks of two deployments would meet in it; end the other one, or give"
            " this one another MASTER_PORT"
        ) from None
    (path / _ADOPTS).touch()
    return path


def find_named(name: str) -> Path | None:
    """Return the run directory of this user with that name, if its owner lives."""
    paths = (Path(parent, _PREFIX + name) for parent in _places())
    return next((path for path in paths if owner_lives(path)), None)


def adopts_ranks(run_dir: Path) -> bool:
    """Tell whether ranks that another launcher has started look for their environment there."""
    return (run_dir / _ADOPTS).exists()


def _hold(path: Path) -> int:
    """Lock a file in `path` and return its descriptor; the file gets its name once it is locked.

    On a file system without locks it gets none, and nobody takes the folder for one that was left.
    """
    draft = path / f"{_LOCK}.draft"
    fd = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(fd, str(os.getpid()).encode())
        draft.rename(path / _LOCK)
    return fd


def remove_abandoned() -> None:
    """Remove the folders of processes that were killed, wherever one would be made."""
    for parent in _places():
        _remove_abandoned(parent)


def _remove_abandoned(parent: str) -> None:
    with contextlib.suppress(OSError):
        for path in Path(parent).glob(f"{_PREFIX}*"):
            if owner_lives(path) is False:
                shutil.rmtree(path, ignore_errors=True)


def living_run_dirs() -> list[Path]:
    """Return the run directories of this user whose owner lives, in the places where one would be made."""
    # One place may be there under two names.
    places = {Path(parent).resolve() for parent in _places()}
    found = (path for place in places for path in place.glob(f"{_PREFIX}*"))
    return sorted(path for path in found if not path.name.startswith(_TRIAL_PREFIX) and owner_lives(path))


def owner_lives(path: Path) -> bool | None:
    """Whether the owner of a run directory lives; None for what is none, or not of this user."""
    try:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return None
        fd = os.open(path / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # Shared, so that two who look at once do not take each other for the owner.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(fd)


def open_owner(path: Path) -> tuple[int, int] | None:
    """Return the pid of the process that a run directory belongs to, and a pidfd of it, to be closed.

    None where it has ended, or cannot be seen from here, as one in another container.
    """
    try:
        found = (path / _LOCK).stat()
        pid = int((path / _LOCK).read_text(encoding="ascii"))
        pidfd = os.pidfd_open(pid)
    except (OSError, ValueError):
        return None
    # The descriptor comes before the look: a pid that went to another process meanwhile does not have the lock.
    if _has_open(pid, found):
        return pid, pidfd
    os.close(pidfd)
    return None


def _has_open(pid: int, file: os.stat_result) -> bool:
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samestat(link.stat(), file):
                    return True
    return False


def write_config(run_dir: Path, config: Config) -> None:
    """Leave the resolved configuration for the processes of the deployment.

    Raises:
        ConfigError: there is no room for it.
    """
    try:
        (run_dir / _CONFIG).write_text(config.model_dump_json(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"the run directory {run_dir} cannot be written: {error.strerror}; it needs a few KiB: free some"
            " space there or set TMPDIR to another folder"
        ) from error


def read_config(run_dir: Path) -> Config:
    """Read what `write_config` left."""
    return Config.model_validate_json((run_dir / _CONFIG).read_text(encoding="utf-8"))


def find_config(run_dir: Path) -> Config | None:
    """Return what `write_config` left; None where it has not yet, or another version has."""
    try:
        return read_config(run_dir)
    except (OSError, ValidationError):
        return None


def replica_dirs(run_dir: Path, num_replicas: int) -> list[Path]:
    """Return the folder of each replica: that of the deployment for the only one.

    That of a replica which is lost is not there any more.
    """
    # Short, since paths of sockets are.
    return [run_dir] if num_replicas == 1 else [run_dir / f"r{number}" for number in range(num_replicas)]


def worker_socket(run_dir: Path, epoch: int) -> str:
    """Return the path where workers of `epoch` find the coordinator."""
    return str(run_dir / f"workers-{epoch}.sock")


def epoch_dir(run_dir: Path, epoch: int) -> Path:
    """Return the folder where the ranks of `epoch` meet; the group makes it before they start."""
    return run_dir / f"epoch-{epoch}"


def heartbeats_path(run_dir: Path, epoch: int) -> Path:
    """Return where the processes of `epoch` note how far they are."""
    return run_dir / f"heartbeats-{epoch}"


def newest_heartbeats(run_dir: Path) -> Path | None:
    """Return the heartbeats of the newest epoch, or None before the first has begun."""
    epochs = [path.name.partition("-")[2] for path in run_dir.glob("heartbeats-*")]
    numbers = [int(epoch) for epoch in epochs if epoch.isdecimal()]
    return heartbeats_path(run_dir, max(numbers)) if numbers else None


def stack_path(run_dir: Path, name: str) -> Path:
    """Return where process `name` ("rank 0") writes its Python stacks, when asked and when it crashes."""
    return run_dir / f"stack-{name.replace(' ', '-')}.txt"


def request_address(run_dir: Path) -> str:
    """Return the ZeroMQ address where clients find the coordinator."""
    return f"ipc://{run_dir / 'requests.sock'}"
