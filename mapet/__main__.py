"""`python -m mapet`, the form that torchrun starts: `torchrun --nproc-per-node 8 -m mapet pretrain ...`."""

import sys

from mapet.cli import main

if __name__ == "__main__":
    sys.exit(main())
