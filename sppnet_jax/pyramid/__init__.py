"""The idea: spatial pyramid pooling, of whole maps and of windows; pure functions."""
