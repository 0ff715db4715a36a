"""Records of what a machine has done: kept in memory, written to a file, and read again for a replay."""
