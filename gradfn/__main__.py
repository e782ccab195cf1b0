"""`gradfn`, and `python -m gradfn`: handles signals before what takes long is imported."""

import sys

from gradfn.console import handle, stop_at_once


def main() -> int:
    """Run the command line with the process's own words; return the exit code."""
    handle(stop_at_once)
    from gradfn.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
