# The chimera at the size of config/train_shakespeare_char.py: for a recipe of more layers, width and context.
# python train.py config/train_shakespeare_char.py config/search/chimera_6x384.py
out_dir = "out-search/chimera_6x384"
attn_pattern = "fhn,softmax,softmax"
fhn_dynamics = "linear"
use_ferope = True
pos_embedding = "none"
use_bio_mlp = True
bio_threshold = 0.0
bio_omega = 3.0
