"""Cluster trades by the book they met and test each cluster's flow, on CPU or GPU workers."""

__version__ = "0.1.0"
