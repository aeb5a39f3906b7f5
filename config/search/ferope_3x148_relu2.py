# The control of ferope_3x148_omega2: squared ReLU.
out_dir = "out-search/ferope_3x148_relu2"
use_ferope = True
pos_embedding = "none"
mlp_act = "relu2"
n_layer = 3
n_embd = 148
n_head = 2
