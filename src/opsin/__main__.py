"""`python -m opsin`, the same as `opsin`."""

import sys

from opsin.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
