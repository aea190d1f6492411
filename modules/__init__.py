"""Everything that drafts, verifies, decodes or aligns: one file per method, grouped by family."""
