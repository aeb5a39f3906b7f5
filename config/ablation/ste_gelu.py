# The backward leaves out gelu'.
out_dir = "out-ablation/ste_gelu"
ste_gelu = True
