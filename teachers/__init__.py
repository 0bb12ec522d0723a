"""Who teaches, one file per way of getting a frozen teacher: a function of the recipe's keys that returns a Teacher."""
