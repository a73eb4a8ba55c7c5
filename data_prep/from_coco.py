"""See `nar_t2i.prepare.coco`; `python -m nar_t2i.prepare.coco` is the same command."""

import sys

from nar_t2i.prepare.coco import main

if __name__ == "__main__":
    sys.exit(main())
