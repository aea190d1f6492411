"""Reports: tables, pages, plots, comparison."""
