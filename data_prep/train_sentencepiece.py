"""See `nar_t2i.prepare.sentencepiece`; `python -m nar_t2i.prepare.sentencepiece` is the same command."""

import sys

from nar_t2i.prepare.sentencepiece import main

if __name__ == "__main__":
    sys.exit(main())
