"""Who learns, one file per network family: a table of sizes, the blocks, the network, its named constructors.
layers.py has what families share.

A constructor takes `num_classes` and options and returns a layer from float32 [B, 3, H, W] to logits [B, num_classes]
that names its classifier (`head`) and the layer before it (`features`).
"""
