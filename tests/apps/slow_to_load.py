"""A module that takes long to load, for blocking.imports."""

import time

time.sleep(0.15)
slow = True
