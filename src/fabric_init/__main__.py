"""``python -m fabric_init …`` is ``fabric-init …``."""

import sys

from fabric_init.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
