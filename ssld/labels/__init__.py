"""Soft labels on disk: what a teacher said of every view, kept so that it is asked only once. No paddle here."""
