# Sigmoid attention whose backward leaves out A (1 - A).
out_dir = "out-ablation/sigmoid_ste"
attn_mode = "sigmoid"
ste_sigmoid = True
