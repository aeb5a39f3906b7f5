# Backpropagation with a head of its own, the control of the local learning rules.
out_dir = "out-ablation/bp"
tie_weights = False
