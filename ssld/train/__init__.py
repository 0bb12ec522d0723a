"""The bench: what several stages share. Paddle lives from here on."""
