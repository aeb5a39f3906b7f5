# The mixture of softmaxes chosen by the mean of the last 8 hidden states, not by the last one.
out_dir = "out-ablation/mfs_slate"
use_mfs_head = True
mfs_slate = True
