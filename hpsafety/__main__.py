"""`python -m hpsafety` is the program `hpsafety`."""

import sys

from hpsafety.cli import main

if __name__ == "__main__":
    sys.exit(main())
