# A mixture of three softmaxes, the first with four facets, instead of one softmax.
out_dir = "out-ablation/mfs"
use_mfs_head = True
