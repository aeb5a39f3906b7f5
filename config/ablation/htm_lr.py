# Columns that predict well learn faster: an HTM-style factor on the update of heads and hidden groups.
out_dir = "out-ablation/htm_lr"
htm_meta_strength = 0.3
