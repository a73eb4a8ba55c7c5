"""See `nar_t2i.prepare.folder`; `python -m nar_t2i.prepare.folder` is the same command."""

import sys

from nar_t2i.prepare.folder import main

if __name__ == "__main__":
    sys.exit(main())
