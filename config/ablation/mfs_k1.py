# Facets alone: one softmax whose tokens v use facet v mod 4.
out_dir = "out-ablation/mfs_k1"
use_mfs_head = True
mfs_K = 1
