# A mixture of three softmaxes, without facets by the token's number.
out_dir = "out-ablation/mfs_p1"
use_mfs_head = True
mfs_P = 1
