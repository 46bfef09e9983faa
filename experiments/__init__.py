"""One script for each table or claim of the paper: runs, writes down, draws it."""
