"""See `nar_t2i.prepare.indices`; `python -m nar_t2i.prepare.indices` is the same command."""

import sys

from nar_t2i.prepare.indices import main

if __name__ == "__main__":
    sys.exit(main())
