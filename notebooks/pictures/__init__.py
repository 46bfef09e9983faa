"""Pictures that the notebooks draw; functions of plain arrays."""
