"""`python -m afds` is `afds`."""

import sys

from afds.cli import main

sys.exit(main())
