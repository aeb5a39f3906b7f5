# Softmax attention with its exact backward written from a row's own numbers.
out_dir = "out-ablation/fuse_attn_local"
fuse_attn_local = True
