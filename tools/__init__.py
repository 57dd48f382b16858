"""Commands that make the files that ship: models, projectors, study, tables, presets, emoji pairs. Not installed."""
