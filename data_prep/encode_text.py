"""See `nar_t2i.prepare.text`; `python -m nar_t2i.prepare.text` is the same command."""

import sys

from nar_t2i.prepare.text import main

if __name__ == "__main__":
    sys.exit(main())
