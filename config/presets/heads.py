# A mixture of three softmaxes for the head, and an auto-encoder of hidden states as an auxiliary loss.
out_dir = "out-heads"
use_mfs_head = True
add_l4_losses = True
