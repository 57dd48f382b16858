"""What makes the files that ship: models, projectors, study, tables, presets. Not installed."""
