"""`python -m baton.chaos`, the same as `baton chaos`."""

import sys

from baton.chaos import main

sys.exit(main())
