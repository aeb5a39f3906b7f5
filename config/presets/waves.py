# FitzHugh-Nagumo waves with every third layer of attention.
out_dir = "out-waves"
attn_pattern = "fhn,fhn,softmax"
