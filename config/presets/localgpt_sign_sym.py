# LocalGPT; its errors go back through the signs of the weights. Plain twin: localgpt.
# Training takes 2.8 GB at 64 sequences per micro-batch; --cost shows its parts, and the time here.
# python train.py config/presets/localgpt_sign_sym.py
base("config/train_shakespeare_char.py", sample_interval=500, init_from="auto")
out_dir = "out-localgpt-sign-sym"
n_layer, n_head, n_embd, block_size = 6, 6, 384, 256
dropout = 0.2
bias = False
tie_weights = False
attn_mode = "sigmoid"
method = "sign_sym"
