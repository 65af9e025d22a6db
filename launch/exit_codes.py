"""How a program of tprt ends: with one message and an exit code.

Knows nothing of what the program does.
"""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

from launch.failure import INPUT_ERRORS
from tprt.errors import TprtError
from tprt.log import tell

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def leave_with(error: TprtError) -> NoReturn:
    """Tell people what is wrong, and exit: with 2 where they can put it right, else with 1."""
    tell(str(error), logging.ERROR)
    sys.exit(EXIT_BAD_INPUT if isinstance(error, INPUT_ERRORS) else EXIT_FAILED)
