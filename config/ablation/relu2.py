# Squared ReLU instead of GELU: the control for oscillators, which also grow faster than linearly.
out_dir = "out-ablation/relu2"
mlp_act = "relu2"
