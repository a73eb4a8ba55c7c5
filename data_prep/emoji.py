"""See `nar_t2i.prepare.emoji`; `python -m nar_t2i.prepare.emoji` is the same command."""

import sys

from nar_t2i.prepare.emoji import main

if __name__ == "__main__":
    sys.exit(main())
