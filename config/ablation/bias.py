# The CPU recipe has no biases; GPT-2 has. This turns them on.
out_dir = "out-ablation/bias"
bias = True
