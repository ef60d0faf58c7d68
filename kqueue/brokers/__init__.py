"""Brokers: where jobs stand while nobody runs them. `base` says what one must do; one file each does it."""
