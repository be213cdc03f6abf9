"""`mapet`, and `python -m mapet`, the form that torchrun starts (`torchrun --nproc-per-node 8 -m mapet ...`)."""

import sys


def main() -> int:
    """The command line of this process; a Ctrl-C while it is imported has nothing to tell either."""
    try:
        from mapet.cli import main
    except KeyboardInterrupt:
        print("mapet: interrupted: stopped by Ctrl-C before anything was done", file=sys.stderr)
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(main())
