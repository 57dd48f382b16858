"""`python -m diva_lab` is the command `diva-lab`."""

import sys

from diva_lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
