# Rotary phases of the absolute position (RoPE) in place of the position table.
out_dir = "out-ablation/ferope_absolute"
use_ferope = True
pos_embedding = "none"
