"""A job module that calls sys.exit()."""

import sys

sys.exit(7)
