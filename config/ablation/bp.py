# Backpropagation with a head of its own, the control of the rules in this folder.
out_dir = "out-ablation/bp"
tie_weights = False
