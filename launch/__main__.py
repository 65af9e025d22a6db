"""`python -m launch` is `tprt`."""

from __future__ import annotations

from launch.cli import main

if __name__ == "__main__":
    main()
