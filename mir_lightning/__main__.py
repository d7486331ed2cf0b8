"""``python -m mir_lightning``: the command line."""

import sys

from mir_lightning.cli import main

sys.exit(main())
