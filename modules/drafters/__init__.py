"""Everything that proposes tokens; one folder per family, one file per method."""
