"""`python -m nar_t2i` is `nar-t2i`."""

import sys

from nar_t2i.cli import main

if __name__ == "__main__":
    sys.exit(main())
