# FitzHugh-Nagumo waves with every third layer of attention.
base("config/train_shakespeare_char_cpu.py", sample_interval=500, init_from="auto")  # what it trains on by itself
out_dir = "out-waves"
attn_pattern = "fhn,fhn,softmax"
