"""Time, memory, files and progress bars."""
