# Each block reads a mix of the stream and the embedding.
out_dir = "out-ablation/x0_skip"
x0_skip = True
