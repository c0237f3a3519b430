"""`python -m megalign COMMAND --config run.yaml --field value`."""

import sys

from megalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
