"""Images in: sources, their index, the order of samples, decoding and views. No paddle here."""
