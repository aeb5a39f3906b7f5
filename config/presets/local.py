# Errors go back through the signs of the weights. The head has an embedding of its own, as every such rule needs.
base("config/train_shakespeare_char_cpu.py", sample_interval=500, init_from="auto")  # what it trains on by itself
out_dir = "out-local"
method = "sign_sym"
tie_weights = False
