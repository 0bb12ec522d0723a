"""Data only: recipes in YAML, each opening with a lab note."""
