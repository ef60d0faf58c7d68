"""The commands of each broker: Lua, SQL or plain structures. Plain functions without I/O, shared by the daemon and the client."""
