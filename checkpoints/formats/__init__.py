"""Writers for the file formats of serving engines."""
