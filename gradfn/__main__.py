"""`gradfn`, and `python -m gradfn`: handles signals before what takes long is imported."""

from gradfn.console import handle, leave, stop_at_once


def main() -> None:
    """Run the command line with the process's own words, and end the process."""
    handle(stop_at_once)
    from gradfn.cli import main

    leave(main())


if __name__ == "__main__":
    main()
