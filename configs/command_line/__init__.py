"""Config files by name, and commands that end in one line."""
