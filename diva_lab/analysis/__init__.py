"""Why tuning works or does not: gradients, alignment, and DCR's theory."""
