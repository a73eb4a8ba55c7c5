"""`python -m nar_t2i` is `nar-t2i`."""

from nar_t2i.cli import program

if __name__ == "__main__":
    program()
