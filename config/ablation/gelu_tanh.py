# The tanh form of GELU that OpenAI's GPT-2 has: how much an approximation at the 1e-3 level matters.
out_dir = "out-ablation/gelu_tanh"
mlp_act = "gelu_tanh"
