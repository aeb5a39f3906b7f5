# A mixture of three softmaxes for the head, and an auto-encoder of hidden states as an auxiliary loss.
base("config/train_shakespeare_char_cpu.py", sample_interval=500, init_from="auto")  # what it trains on by itself
out_dir = "out-heads"
use_mfs_head = True
add_l4_losses = True
