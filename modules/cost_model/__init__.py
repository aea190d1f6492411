"""What a call costs on this machine, and which tree size pays."""
