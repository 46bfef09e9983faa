"""Testing and reading SPP-nets as classifiers (the paper's section 3)."""
