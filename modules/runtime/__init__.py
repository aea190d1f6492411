"""What the machine gives: time, memory, progress bars."""
