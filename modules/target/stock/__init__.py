"""What our passes have to know of a library's model, and the proof that they know it."""
