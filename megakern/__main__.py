"""`python -m megakern` is the command `megakern`."""

import sys

from megakern.cli import main

sys.exit(main())
