"""Teachers, whatever they are made of: how one is asked, several as one, other classes, and how good one is."""
