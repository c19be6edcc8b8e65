"""The command line of optpass; import as optpass.cli."""
