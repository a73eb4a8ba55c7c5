"""See `nar_t2i.prepare.table`; `python -m nar_t2i.prepare.table` is the same command."""

import sys

from nar_t2i.prepare.table import main

if __name__ == "__main__":
    sys.exit(main())
