"""A progress bar for people: prompts done, tokens per second, sequences running."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tprt.server.completion import Completion


class GenerationProgress:
    """Shows on standard error how far `completions` are, if that is a terminal and `shown` is asked for."""

    def __init__(self, completions: Sequence[Completion], shown: bool) -> None:
        self._completions = completions
        self._started_s = time.monotonic()
        self._bar = Progress(
            TextColumn("generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[speed]:.1f} tok/s, {task.fields[running]} running"),
            console=Console(file=sys.stderr),
            disable=not (shown and sys.stderr.isatty()),
            transient=True,
            # Results on standard output are not for the bar's console, which is standard error.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("", total=len(completions), speed=0.0, running=0)

    def update(self) -> None:
        """Show the present state."""
        if self._bar.disable:
            return
        done = sum(completion.finished for completion in self._completions)
        begun = sum(bool(completion.token_ids) for completion in self._completions)
        tokens = sum(len(completion.token_ids) for completion in self._completions)
        speed = tokens / max(time.monotonic() - self._started_s, 1e-9)
        self._bar.update(self._task, completed=done, speed=speed, running=begun - done)

    def __enter__(self) -> GenerationProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
