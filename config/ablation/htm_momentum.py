# The same factor on AdamW's first moment.
out_dir = "out-ablation/htm_momentum"
htm_meta_strength = 0.3
htm_meta_target = "momentum"
