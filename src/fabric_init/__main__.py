"""``python -m fabric_init …`` is ``fabric-init …``."""

from fabric_init.cli.main import main

if __name__ == "__main__":
    main()
