"""See `nar_t2i.prepare.scenes`; `python -m nar_t2i.prepare.scenes` is the same command."""

import sys

from nar_t2i.prepare.scenes import main

if __name__ == "__main__":
    sys.exit(main())
