"""See `nar_t2i.prepare.tokens`; `python -m nar_t2i.prepare.tokens` is the same command."""

import sys

from nar_t2i.prepare.tokens import main

if __name__ == "__main__":
    sys.exit(main())
