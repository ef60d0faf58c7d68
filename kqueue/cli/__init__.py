"""The commands: `kqueued`, the daemon, and `kqueue`, the operator's. They parse, wire and print; the work is done below."""
