"""Weights that others have written, brought into our own form."""
