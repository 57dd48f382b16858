"""The notebooks: their parameters, sentences, widgets, and `diva-lab run` with its report."""
