# The published Wav-KAN layer, a wavelet on every edge, with as many parameters; slow.
out_dir = "out-ablation/kan_edge"
use_kan = True
kan_edges = "edge"
